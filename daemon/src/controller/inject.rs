//! What a pod with the annotation `weightd.io/model` gets, as a function of the pod alone.
//!
//! `deploy/chart/templates/injection-policy.yaml` does the same in CEL: whoever changes one changes the other.
//!
//! Only what is missing is added, each part by itself, so that a second pass changes nothing, or completes
//! containers that another webhook added meanwhile. What the author wrote stays as it is.

use serde_json::{Map, Value, json};
use weightd_core::model::{ModelRef, Scheme};

use crate::kube::placement;

/// The volume's name.
pub(super) const VOLUME: &str = "weightd-model";

const MODEL: &str = "weightd.io/model";
const MOUNT_PATH: &str = "weightd.io/mount-path";
const LAYOUT: &str = "weightd.io/layout";
const SECRET: &str = "weightd.io/secret";

/// Of the copy that kubelet makes of a static pod: what runs is not taken from there.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Source: Kubernetes asks webhooks for warnings of at most 256 characters.
const WARNING_MAX: usize = 256;

/// What becomes of a pod.
#[derive(Debug, Default)]
pub(super) struct Injected {
    /// The pod with all that it lacked; `None` if it lacked nothing.
    pub pod: Option<Value>,
    /// What its author is told.
    pub warnings: Vec<String>,
}

/// A pod's spec that has not the shape of one.
#[derive(Debug, thiserror::Error)]
#[error("the pod's {0} has not the shape that it has in a Pod")]
pub(super) struct Misshapen(&'static str);

/// What the annotations ask for.
struct Wanted<'a> {
    model: &'a str,
    reference: Option<ModelRef>,
    path: &'a str,
    layout: Option<&'a str>,
    secret: Option<&'a str>,
}

/// Completes `pod` for the CSI driver `driver`.
///
/// # Errors
///
/// [`Misshapen`] if it is no pod.
pub(super) fn inject(pod: &Value, driver: &str) -> Result<Injected, Misshapen> {
    let mut injected = Injected::default();
    let annotation = |key: &str| annotation(pod, key);
    let Some(model) = annotation(MODEL).filter(|_| annotation(MIRROR).is_none()) else {
        return Ok(injected);
    };
    if is_written(pod, driver, model) {
        return Ok(injected);
    }
    let mut warn = |text: String| injected.warnings.push(shortened(&text));
    if is_for_windows(pod) {
        warn("weightd serves nodes with Linux; the pod gets no model".to_owned());
        return Ok(injected);
    }
    let path = annotation(MOUNT_PATH).unwrap_or("/models");
    let Some(path) = mount_path(path) else {
        warn(format!(
            "{MOUNT_PATH}: `{path}` is no absolute path without `:` and `..`; the pod gets no model"
        ));
        return Ok(injected);
    };
    let taken = volumes(pod).find(|volume| volume["name"] == VOLUME);
    if taken.is_some_and(|volume| csi(volume, driver).is_none()) {
        warn(format!(
            "the pod has another volume of the name {VOLUME}; it gets no model"
        ));
        return Ok(injected);
    }
    let wanted = Wanted {
        model,
        reference: model
            .parse()
            .map_err(|error| warn(format!("{MODEL}: {error}; the pod will not start")))
            .ok(),
        path,
        layout: annotation(LAYOUT),
        secret: annotation(SECRET).filter(|name| {
            let good = is_name(name);
            if !good {
                warn(format!(
                    "{SECRET}: `{name}` is no Secret's name; it is left out"
                ));
            }
            good
        }),
    };
    check_layout(&wanted, &mut warn);
    let mut next = pod.clone();
    complete(&mut next, &wanted, driver, &mut warn)?;
    injected.pod = (next != *pod).then_some(next);
    Ok(injected)
}

fn annotation<'a>(pod: &'a Value, key: &str) -> Option<&'a str> {
    let annotations = pod.pointer("/metadata/annotations")?;
    let text = annotations.get(key)?.as_str()?.trim();
    (!text.is_empty()).then_some(text)
}

/// Whether the author has written the volume, and mounts it where it is wanted.
fn is_written(pod: &Value, driver: &str, model: &str) -> bool {
    let written = volumes(pod).filter(|volume| csi(volume, driver).is_some());
    let mut others = written.filter(|volume| volume["name"] != VOLUME);
    others.any(|volume| {
        let name = volume["name"].as_str().unwrap_or_default();
        let attribute = volume["csi"]["volumeAttributes"]["source"].as_str();
        match attribute.filter(|source| !source.is_empty()) {
            Some(source) => source == model,
            None => annotation(pod, &format!("weightd.io/volume.{name}")).is_none(),
        }
    })
}

fn is_for_windows(pod: &Value) -> bool {
    let said = [
        pod.pointer("/spec/os/name"),
        pod.pointer("/spec/nodeSelector/kubernetes.io~1os"),
    ];
    said.into_iter().flatten().any(|os| os == "windows")
}

fn check_layout(wanted: &Wanted<'_>, warn: &mut impl FnMut(String)) {
    match wanted.layout {
        None | Some("flat") => {}
        Some("hf-cache") => {
            let scheme = wanted.reference.as_ref().map(ModelRef::scheme);
            if scheme.is_some_and(|scheme| scheme != Scheme::Hf) {
                warn(format!(
                    "{LAYOUT}: hf-cache is for hf:// models; the pod will not start"
                ));
            }
        }
        Some(other) => warn(format!(
            "{LAYOUT}: `{other}` is none of flat, hf-cache; the pod will not start"
        )),
    }
}

fn complete(
    pod: &mut Value,
    wanted: &Wanted<'_>,
    driver: &str,
    warn: &mut impl FnMut(String),
) -> Result<(), Misshapen> {
    let spec = pod.get_mut("spec").and_then(Value::as_object_mut);
    let spec = spec.ok_or(Misshapen("spec"))?;
    let volumes = list(spec, "volumes").ok_or(Misshapen("volumes"))?;
    if volumes.iter().all(|volume| volume["name"] != VOLUME) {
        volumes.push(volume(wanted, driver));
    }
    let containers = list(spec, "containers").ok_or(Misshapen("containers"))?;
    for container in containers {
        complete_container(container, wanted, warn)?;
    }
    if spec.get("initContainers").is_some_and(Value::is_array) {
        let inits = list(spec, "initContainers").ok_or(Misshapen("initContainers"))?;
        // Those run beside the main ones. The others prepare something, and need no model.
        for sidecar in inits
            .iter_mut()
            .filter(|init| init["restartPolicy"] == "Always")
        {
            complete_container(sidecar, wanted, warn)?;
        }
    }
    prefer_nodes(spec, wanted).ok_or(Misshapen("affinity"))
}

fn volume(wanted: &Wanted<'_>, driver: &str) -> Value {
    let mut csi = json!({
        "driver": driver,
        "readOnly": true,
        "volumeAttributes": { "source": wanted.model },
    });
    if let Some(layout) = wanted.layout {
        csi["volumeAttributes"]["layout"] = layout.into();
    }
    if let Some(secret) = wanted.secret {
        csi["nodePublishSecretRef"] = json!({ "name": secret });
    }
    json!({ "name": VOLUME, "csi": csi })
}

fn complete_container(
    container: &mut Value,
    wanted: &Wanted<'_>,
    warn: &mut impl FnMut(String),
) -> Result<(), Misshapen> {
    const WHAT: Misshapen = Misshapen("container");
    let container = container.as_object_mut().ok_or(WHAT)?;
    let name = container.get("name").and_then(Value::as_str);
    let name = name.unwrap_or_default().to_owned();
    let array = |key| container.get(key).and_then(Value::as_array);
    let mounts = array("volumeMounts").map_or(&[][..], Vec::as_slice);
    let devices = array("volumeDevices").map_or(&[][..], Vec::as_slice);
    let own = mounts.iter().find(|mount| mount["name"] == VOLUME);
    let path = own.map(|own| own["mountPath"].as_str().unwrap_or(wanted.path).to_owned());
    if path.is_none() {
        // A mount below ours would need a directory that is made in a read-only volume.
        let below = format!("{}/", wanted.path);
        let in_the_way = |path: &&str| *path == wanted.path || path.starts_with(&below);
        let found = paths(mounts, "mountPath").find(in_the_way);
        if let Some(path) = found.or_else(|| paths(devices, "devicePath").find(in_the_way)) {
            warn(format!(
                "container `{name}` has something else at {path}; it gets no model"
            ));
            return Ok(());
        }
        let mounts = list(container, "volumeMounts").ok_or(WHAT)?;
        mounts.push(json!({ "name": VOLUME, "mountPath": wanted.path, "readOnly": true }));
    }
    let path = path.as_deref().unwrap_or(wanted.path);
    if wanted.layout == Some("hf-cache") {
        return name_cache(container, path).ok_or(WHAT);
    }
    Ok(())
}

fn paths<'a>(list: &'a [Value], key: &'a str) -> impl Iterator<Item = &'a str> {
    let paths = list.iter().filter_map(move |one| one[key].as_str());
    paths.map(|path| path.trim_end_matches('/'))
}

/// Tells the Hub's client where the cache is, and that there is nothing else: it could not write to it.
fn name_cache(container: &mut Map<String, Value>, path: &str) -> Option<()> {
    let env = list(container, "env")?;
    let find = |env: &Vec<Value>, name: &str| env.iter().find(|one| one["name"] == name).cloned();
    match find(env, "HF_HUB_CACHE") {
        None => env.push(json!({ "name": "HF_HUB_CACHE", "value": path })),
        // The author's own cache is elsewhere, and may have to be filled.
        Some(own) if own["value"] != path => return Some(()),
        Some(_) => {}
    }
    if find(env, "HF_HUB_OFFLINE").is_none() {
        env.push(json!({ "name": "HF_HUB_OFFLINE", "value": "1" }));
    }
    Some(())
}

/// Prefers nodes that have the model; at the pinned commit, if there is one.
fn prefer_nodes(spec: &mut Map<String, Value>, wanted: &Wanted<'_>) -> Option<()> {
    // A directory of a node's own disk is no cached model.
    let model = wanted.reference.as_ref();
    let Some(model) = model.filter(|model| model.scheme() != Scheme::File) else {
        return Some(());
    };
    let Some(key) = placement::label_key(model) else {
        return Some(());
    };
    let commit = (model.scheme() == Scheme::Hf)
        .then(|| model.pinned())
        .flatten();
    let affinity = object(spec, "affinity")?;
    let affinity = object(affinity, "nodeAffinity")?;
    let terms = list(affinity, "preferredDuringSchedulingIgnoredDuringExecution")?;
    let names_it = |term: &Value| {
        let expressions = term["preference"]["matchExpressions"].as_array();
        expressions.is_some_and(|all| all.iter().any(|one| one["key"] == *key))
    };
    if !terms.iter().any(names_it) {
        let expression = match commit {
            Some(commit) => json!({ "key": key, "operator": "In", "values": [commit.as_str()] }),
            None => json!({ "key": key, "operator": "Exists" }),
        };
        let preference = json!({ "matchExpressions": [expression] });
        terms.push(json!({ "weight": 100, "preference": preference }));
    }
    Some(())
}

fn volumes(pod: &Value) -> impl Iterator<Item = &Value> {
    let volumes = pod.pointer("/spec/volumes").and_then(Value::as_array);
    volumes.into_iter().flatten()
}

fn csi<'a>(volume: &'a Value, driver: &str) -> Option<&'a Value> {
    let csi = volume.get("csi")?;
    (csi["driver"] == driver).then_some(csi)
}

/// The list `key`, made if it is missing; `None` if something else is there.
fn list<'a>(map: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Vec<Value>> {
    let value = map.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut()
}

/// The same for an object.
fn object<'a>(map: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    let value = map.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

/// A path that the API server takes, in one spelling.
fn mount_path(path: &str) -> Option<&str> {
    let path = path.trim_end_matches('/');
    let good = path.starts_with('/')
        && path.len() <= 1024
        && !path.contains([':', '\0', '\n'])
        && path.split('/').all(|part| part != "..");
    good.then_some(path)
}

/// Whether the API server takes it for a Secret's name: else it would refuse the pod.
///
/// Source: Kubernetes, "Object Names and IDs", DNS subdomain names.
fn is_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let edge = |c: Option<&u8>| c.is_some_and(u8::is_ascii_alphanumeric);
    let is_label = |label: &str| {
        let label = label.as_bytes();
        label.iter().copied().all(allowed) && edge(label.first()) && edge(label.last())
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// Fit for a line that the API server hands to the client.
fn shortened(text: &str) -> String {
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut clean: String = clean.collect();
    if clean.chars().count() > WARNING_MAX {
        clean = clean.chars().take(WARNING_MAX - 1).chain(['…']).collect();
    }
    clean
}

#[cfg(test)]
mod tests;
