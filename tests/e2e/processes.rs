//! Several processes and one store: what one of them brings, the others do not fetch again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use weightd_standin::{Fault, FaultKind, Hub, Origin};

use super::crash::{MIB, Model, hub, sound};
use super::harness::{Running, Sandbox, tree, wait_until};

fn start(sandbox: &Sandbox, hub: &Hub, model: &str) -> Running {
    let mut command = sandbox.weightctl();
    command.env("HF_ENDPOINT", hub.endpoint());
    Running::start(command.args(["prefetch", model]))
}

/// Every CDN body trickles, at this rate per shard.
fn slow(hub: &Hub, bytes_per_second: u64) {
    let slow = FaultKind::Slow { bytes_per_second };
    hub.fault(Fault::new(slow).on(Origin::Cdn).forever());
}

#[track_caller]
fn has_the_tree_of(fetched: &Value, model: &Model) {
    let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
    assert!(
        tree(&path) == model.tree(),
        "{fetched}: it differs from the origin"
    );
}

fn number(value: &Value, name: &str) -> u64 {
    value[name]
        .as_u64()
        .unwrap_or_else(|| panic!("no {name} in {value}"))
}

/// Bytes that the journals below `root` have, and those that are sealed.
fn has_some_bytes(root: &Path, model: &Model) -> bool {
    root.join("staging").exists() && model.missing_from(root) < model.shard_bytes()
}

#[test]
fn two_processes_that_want_the_same_model_at_once_fetch_it_once() {
    let (sandbox, hub) = (Sandbox::new(), hub());
    let model = Model::new(0, 1..=4, 4 * MIB);
    model.publish(&hub, "org/model");
    slow(&hub, 8 * MIB);

    let both = [(); 2].map(|()| start(&sandbox, &hub, "hf://org/model"));
    let both = both.map(|one| one.finish().json());

    assert_eq!(both[0]["path"], both[1]["path"]);
    assert_eq!(hub.cdn_bytes_sent(), model.shard_bytes());
    has_the_tree_of(&both[0], &model);
    for one in &both {
        let sum = number(one, "bytes_fetched") + number(one, "bytes_reused");
        assert_eq!(sum, number(one, "bytes"), "{one}");
    }
    let fetched = number(&both[0], "bytes_fetched") + number(&both[1], "bytes_fetched");
    assert_eq!(fetched, number(&both[0], "bytes"), "{both:?}");
    sound(&sandbox.root());
}

#[test]
fn two_models_fetched_at_once_by_two_processes_bring_shared_shards_once() {
    let (sandbox, hub) = (Sandbox::new(), hub());
    let models = [Model::new(0, 1..=4, 2 * MIB), Model::new(1, 3..=6, 2 * MIB)];
    models[0].publish(&hub, "org/model");
    models[1].publish(&hub, "org/other");
    slow(&hub, 4 * MIB);

    let both = ["hf://org/model", "hf://org/other"].map(|name| start(&sandbox, &hub, name));
    let both = both.map(|one| one.finish().json());

    assert_eq!(
        hub.cdn_bytes_sent(),
        6 * 2 * MIB,
        "six shards, two of them in both"
    );
    for (fetched, model) in both.iter().zip(&models) {
        has_the_tree_of(fetched, model);
    }
    sound(&sandbox.root());
}

#[test]
fn a_process_that_waits_takes_over_when_the_one_that_fetches_is_killed() {
    let (sandbox, hub) = (Sandbox::new(), hub());
    let model = Model::new(0, 1..=3, 8 * MIB);
    model.publish(&hub, "org/model");
    slow(&hub, 4 * MIB);
    let root = sandbox.root();

    let mut first = start(&sandbox, &hub, "hf://org/model");
    wait_until("the first has some blocks", || {
        has_some_bytes(&root, &model)
    });
    let mut second = start(&sandbox, &hub, "hf://org/model");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!first.ended() && !second.ended(), "both are under way");
    let asked = hub
        .requests()
        .iter()
        .filter(|request| request.origin == Origin::Cdn)
        .count();
    assert_eq!(
        asked, 3,
        "the second one asked the CDN although the first one is at it"
    );
    first.kill();
    let second = second.finish().json();

    has_the_tree_of(&second, &model);
    let (fetched, reused) = (
        number(&second, "bytes_fetched"),
        number(&second, "bytes_reused"),
    );
    assert!(reused >= MIB, "{second}: the journaled blocks count");
    assert!(fetched < model.shard_bytes(), "{second}: it began anew");
    assert_eq!(fetched + reused, number(&second, "bytes"));
    // Lost with the first: for each of its three connections a block in memory, as much on its way.
    let sent = hub.cdn_bytes_sent();
    assert!(
        sent <= model.shard_bytes() + 3 * 2 * MIB,
        "{sent} bytes sent"
    );
    sound(&root);
}

#[test]
fn five_processes_with_deaths_among_them_still_fetch_the_model() {
    let (sandbox, hub) = (Sandbox::new(), hub());
    let model = Model::new(0, 1..=4, 4 * MIB);
    model.publish(&hub, "org/model");
    slow(&hub, 4 * MIB);

    let mut all = [(); 5].map(|()| start(&sandbox, &hub, "hf://org/model"));
    for one in &mut all[..4] {
        std::thread::sleep(Duration::from_millis(250));
        if !one.ended() {
            one.kill();
        }
    }
    let [.., last] = all;
    let fetched = last.finish().json();

    has_the_tree_of(&fetched, &model);
    let sent = hub.cdn_bytes_sent();
    assert!(
        sent <= model.shard_bytes() + 4 * 4 * 2 * MIB,
        "{sent} bytes sent after four deaths"
    );
    sound(&sandbox.root());
}

#[test]
fn commands_that_open_a_store_do_not_stumble_over_collections_of_it() {
    let sandbox = Sandbox::new();
    std::thread::scope(|scope| {
        for words in [
            ["gc", "--partial"],
            ["gc", "--partial"],
            ["ls", "--files"],
            ["ls", "--files"],
        ] {
            let sandbox = &sandbox;
            scope.spawn(move || {
                for _ in 0..25 {
                    sandbox.run(&[], &words).json();
                }
            });
        }
    });
}
