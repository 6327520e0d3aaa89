use serde_json::{Value, json};

use super::*;

const DRIVER: &str = "csi.weightd.io";
const COMMIT: &str = "0e9e39f249a16976918f6564b8830bc894c89659";

/// A pod with one container, these annotations, and the rest of `spec`.
fn pod(annotations: Value, spec: Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "p", "annotations": annotations },
        "spec": { "containers": [{ "name": "main", "image": "server" }] },
    });
    for (key, value) in spec.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    pod
}

fn injected(pod: &Value) -> Value {
    let done = inject(pod, DRIVER).unwrap();
    assert!(done.warnings.is_empty(), "{:?}", done.warnings);
    let next = done.pod.expect("something was injected");
    let again = inject(&next, DRIVER).unwrap();
    assert_eq!(again.pod, None, "a second pass changes nothing");
    next
}

#[track_caller]
fn left_alone(pod: &Value, warning: Option<&str>) {
    let done = inject(pod, DRIVER).unwrap();
    assert_eq!(done.pod, None);
    match warning {
        None => assert!(done.warnings.is_empty(), "{:?}", done.warnings),
        Some(words) => assert!(done.warnings[0].contains(words), "{:?}", done.warnings),
    }
}

#[test]
fn a_pod_gets_volume_mounts_and_preference() {
    let next = injected(&pod(
        json!({ "weightd.io/model": format!("hf://org/model@{COMMIT}\n") }),
        json!({}),
    ));

    let volume = json!([{ "name": "weightd-model", "csi": {
        "driver": DRIVER,
        "readOnly": true,
        "volumeAttributes": { "source": format!("hf://org/model@{COMMIT}") },
    } }]);
    assert_eq!(next["spec"]["volumes"], volume);
    let container = &next["spec"]["containers"][0];
    let mount = json!([{ "name": "weightd-model", "mountPath": "/models", "readOnly": true }]);
    assert_eq!(container["volumeMounts"], mount);
    assert!(container.get("env").is_none(), "{container}");
    let terms = "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution";
    let term = json!([{ "weight": 100, "preference": { "matchExpressions": [
        { "key": "model.weightd.io/hf.org.model", "operator": "In", "values": [COMMIT] },
    ] } }]);
    assert_eq!(next.pointer(terms), Some(&term));
}

#[test]
fn annotations_say_where_how_and_with_which_secret() {
    let annotations = json!({
        "weightd.io/model": "hf://org/model@main",
        "weightd.io/mount-path": "/cache/hub/",
        "weightd.io/layout": "hf-cache",
        "weightd.io/secret": "hub-token",
    });
    let own = json!({ "containers": [
        { "name": "bare" },
        { "name": "online", "env": [{ "name": "HF_HUB_OFFLINE", "value": "0" }] },
        { "name": "elsewhere", "env": [{ "name": "HF_HUB_CACHE", "value": "/own" }] },
    ] });
    let next = injected(&pod(annotations, own));

    let csi = &next["spec"]["volumes"][0]["csi"];
    assert_eq!(csi["volumeAttributes"]["layout"], "hf-cache");
    assert_eq!(csi["nodePublishSecretRef"]["name"], "hub-token");
    let cache = json!({ "name": "HF_HUB_CACHE", "value": "/cache/hub" });
    let offline = |value| json!({ "name": "HF_HUB_OFFLINE", "value": value });
    let containers = &next["spec"]["containers"];
    assert_eq!(containers[0]["volumeMounts"][0]["mountPath"], "/cache/hub");
    assert_eq!(containers[0]["env"], json!([cache, offline("1")]));
    assert_eq!(containers[1]["env"], json!([offline("0"), cache]));
    assert_eq!(
        containers[2]["env"],
        json!([{ "name": "HF_HUB_CACHE", "value": "/own" }])
    );
}

#[test]
fn a_container_that_mounts_the_volume_itself_is_told_of_its_own_path() {
    let annotations =
        json!({ "weightd.io/model": "hf://org/model", "weightd.io/layout": "hf-cache" });
    let own = json!({ "containers": [
        { "name": "main", "volumeMounts": [{ "name": "weightd-model", "mountPath": "/weights" }] },
    ] });
    let next = injected(&pod(annotations, own));

    let container = &next["spec"]["containers"][0];
    assert_eq!(container["volumeMounts"].as_array().unwrap().len(), 1);
    let cache = json!({ "name": "HF_HUB_CACHE", "value": "/weights" });
    assert_eq!(container["env"][0], cache);
}

#[test]
fn a_pod_for_windows_is_told_that_no_node_of_its_kind_has_the_driver() {
    for spec in [
        json!({ "os": { "name": "windows" } }),
        json!({ "nodeSelector": { "kubernetes.io/os": "windows" } }),
    ] {
        let model = json!({ "weightd.io/model": "hf://org/model" });
        left_alone(&pod(model, spec), Some("Linux"));
    }
    let linux =
        json!({ "os": { "name": "linux" }, "nodeSelector": { "kubernetes.io/os": "linux" } });
    injected(&pod(json!({ "weightd.io/model": "hf://org/model" }), linux));
}

#[test]
fn sidecars_get_the_model_and_other_init_containers_do_not() {
    let next = injected(&pod(
        json!({ "weightd.io/model": "hf://org/model" }),
        json!({ "initContainers": [
            { "name": "first" },
            { "name": "beside", "restartPolicy": "Always" },
        ] }),
    ));

    let inits = &next["spec"]["initContainers"];
    assert!(inits[0].get("volumeMounts").is_none(), "{inits}");
    assert_eq!(inits[1]["volumeMounts"][0]["name"], "weightd-model");
}

#[test]
fn what_is_there_stays_and_stays_in_its_place() {
    let others = json!({
        "volumes": [{ "name": "token", "projected": { "x-unknown": [1] } }],
        "containers": [{ "name": "main", "volumeMounts": [{ "name": "token", "mountPath": "/t" }], "x-new": {} }],
        "affinity": {
            "podAffinity": {},
            "nodeAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [
                { "weight": 1, "preference": { "matchExpressions": [{ "key": "zone", "operator": "Exists" }] } },
            ] },
        },
    });
    let before = pod(
        json!({ "weightd.io/model": "s3://bucket/models/x" }),
        others,
    );
    let next = injected(&before);

    let patch = json_patch::diff(&before, &next);
    let steps = serde_json::to_value(&patch).unwrap();
    for step in steps.as_array().unwrap() {
        assert_eq!(step["op"], "add", "{steps}");
    }
    let paths: Vec<_> = steps
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step["path"].as_str().unwrap())
        .collect();
    assert_eq!(
        paths,
        [
            "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/1",
            "/spec/containers/0/volumeMounts/1",
            "/spec/volumes/1",
        ]
    );
    assert_eq!(
        next.pointer("/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/1/preference/matchExpressions/0"),
        Some(&json!({ "key": "model.weightd.io/s3.bucket.models.x", "operator": "Exists" }))
    );
}

#[test]
fn a_container_that_another_webhook_adds_is_completed() {
    let mut next = injected(&pod(
        json!({ "weightd.io/model": "hf://org/model" }),
        json!({}),
    ));
    let before = next.clone();
    let containers = next["spec"]["containers"].as_array_mut().unwrap();
    containers.push(json!({ "name": "late" }));
    let last = injected(&next);

    assert_eq!(
        last["spec"]["containers"][1]["volumeMounts"][0]["name"],
        "weightd-model"
    );
    assert_eq!(last["spec"]["volumes"], before["spec"]["volumes"]);
    assert_eq!(last["spec"]["affinity"], before["spec"]["affinity"]);
}

#[test]
fn pods_that_ask_for_nothing_are_left_alone() {
    let volume = |attributes: Value| json!({ "volumes": [{ "name": "weights", "csi": { "driver": DRIVER, "volumeAttributes": attributes } }] });
    let model = json!({ "weightd.io/model": "hf://org/model" });
    left_alone(&pod(json!({}), json!({})), None);
    left_alone(&pod(Value::Null, json!({})), None);
    left_alone(&pod(json!({ "weightd.io/model": " \n" }), json!({})), None);
    left_alone(
        &pod(
            json!({ "weightd.io/volume.x": "hf://org/model" }),
            json!({}),
        ),
        None,
    );
    left_alone(&pod(model.clone(), volume(json!({}))), None);
    left_alone(&pod(model.clone(), volume(Value::Null)), None);
    left_alone(
        &pod(model.clone(), volume(json!({ "source": "hf://org/model" }))),
        None,
    );
    let mirror =
        json!({ "weightd.io/model": "hf://org/model", "kubernetes.io/config.mirror": "x" });
    left_alone(&pod(mirror, json!({})), None);
}

#[test]
fn a_volume_of_another_model_is_no_reason_to_leave_it_out() {
    let other = json!({ "volumes": [{ "name": "draft", "csi": {
        "driver": DRIVER, "volumeAttributes": { "source": "hf://org/draft" },
    } }] });
    let model = json!({ "weightd.io/model": "hf://org/model" });
    assert_eq!(
        injected(&pod(model, other))["spec"]["volumes"][1]["name"],
        "weightd-model"
    );

    let named = json!({ "volumes": [{ "name": "draft", "csi": { "driver": DRIVER } }] });
    let both = json!({ "weightd.io/model": "hf://org/model", "weightd.io/volume.draft": "hf://org/draft" });
    assert_eq!(
        injected(&pod(both, named))["spec"]["volumes"][1]["name"],
        "weightd-model"
    );
}

#[test]
fn a_typo_is_told_and_injected_so_that_the_pod_says_it_too() {
    let done = inject(
        &pod(json!({ "weightd.io/model": "org/model" }), json!({})),
        DRIVER,
    )
    .unwrap();
    let next = done.pod.expect("injected");

    assert!(
        done.warnings[0].contains("hf://org/model"),
        "{:?}",
        done.warnings
    );
    let source = "/spec/volumes/0/csi/volumeAttributes/source";
    assert_eq!(next.pointer(source), Some(&json!("org/model")));
    assert!(next["spec"].get("affinity").is_none(), "{next}");
}

#[test]
fn what_would_break_the_pod_is_left_out_and_told() {
    let model = "hf://org/model";
    for path in ["models", "/", "/a:b", "/a/../b", "/a\nb"] {
        let annotations = json!({ "weightd.io/model": model, "weightd.io/mount-path": path });
        left_alone(&pod(annotations, json!({})), Some("weightd.io/mount-path"));
    }
    let taken = json!({ "volumes": [{ "name": "weightd-model", "emptyDir": {} }] });
    left_alone(
        &pod(json!({ "weightd.io/model": model }), taken),
        Some("weightd-model"),
    );

    for path in ["/models", "/models/", "/models/lora"] {
        let own = json!({ "containers": [
            { "name": "main", "volumeMounts": [{ "name": "x", "mountPath": path }] },
            { "name": "other" },
        ] });
        let done = inject(&pod(json!({ "weightd.io/model": model }), own), DRIVER).unwrap();
        let next = done.pod.unwrap();
        assert!(done.warnings[0].contains("`main`"), "{:?}", done.warnings);
        assert_eq!(
            next["spec"]["containers"][0]["volumeMounts"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
        assert_eq!(
            next["spec"]["containers"][1]["volumeMounts"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
    }

    let device = json!({ "containers": [
        { "name": "main", "volumeDevices": [{ "name": "disk", "devicePath": "/models" }] },
    ] });
    let model_only = json!({ "weightd.io/model": model });
    let done = inject(&pod(model_only, device), DRIVER).unwrap();
    assert!(done.warnings[0].contains("`main`"), "{:?}", done.warnings);
    let next = done.pod.unwrap();
    let mounts = next["spec"]["containers"][0].get("volumeMounts");
    assert_eq!(mounts, None, "the API server would refuse the pod");

    for name in ["Not/aName", "a..b", "a.-b", "-a", "a.", &"a".repeat(254)] {
        let annotations = json!({ "weightd.io/model": model, "weightd.io/secret": name });
        let done = inject(&pod(annotations, json!({})), DRIVER).unwrap();
        assert!(
            done.warnings[0].contains("weightd.io/secret"),
            "{:?}",
            done.warnings
        );
        let secret = "/spec/volumes/0/csi/nodePublishSecretRef";
        assert_eq!(done.pod.unwrap().pointer(secret), None, "{name}");
    }
    let annotations = json!({ "weightd.io/model": model, "weightd.io/secret": "hub.token-1" });
    injected(&pod(annotations, json!({})));
}

#[test]
fn a_layout_that_cannot_be_is_told() {
    for (model, layout) in [("hf://org/model", "zip"), ("s3://bucket/x", "hf-cache")] {
        let annotations = json!({ "weightd.io/model": model, "weightd.io/layout": layout });
        let done = inject(&pod(annotations, json!({})), DRIVER).unwrap();
        assert!(
            done.warnings[0].contains("weightd.io/layout"),
            "{:?}",
            done.warnings
        );
    }
}

#[test]
fn warnings_fit_into_a_header() {
    let text = format!("hf://{}\u{7}", "ä".repeat(10_000));
    let done = inject(&pod(json!({ "weightd.io/model": text }), json!({})), DRIVER).unwrap();
    assert!(done.warnings[0].chars().count() <= 256 && !done.warnings[0].contains('\u{7}'));
}

#[test]
fn what_is_no_pod_is_an_error_and_no_panic() {
    let model = json!({ "annotations": { "weightd.io/model": "hf://org/model" } });
    for spec in [
        json!(null),
        json!("x"),
        json!({ "volumes": {} }),
        json!({ "containers": "x" }),
        json!({ "containers": [1] }),
        json!({ "containers": [{ "volumeMounts": 1 }] }),
        json!({ "containers": [{}], "affinity": [] }),
        json!({ "containers": [{}], "affinity": { "nodeAffinity": 1 } }),
    ] {
        let pod = json!({ "metadata": model, "spec": spec });
        inject(&pod, DRIVER).expect_err(&pod.to_string());
    }
    for pod in [
        json!(null),
        json!([]),
        json!({ "metadata": { "annotations": [] } }),
    ] {
        assert_eq!(inject(&pod, DRIVER).unwrap().pod, None);
    }
}
