//! `weightctl bench read`: what it measures, and what it refuses.

use std::fs;
use std::path::Path;

use serde_json::Value;
use weightd_standin::generate;

use super::harness::{Ran, Sandbox};

fn model(dir: &Path) {
    generate::write_model(dir, 1, 2, 300_000).expect("a model");
}

fn bench(sandbox: &Sandbox, words: &[&str]) -> Ran {
    sandbox.run(&[], &[&["bench", "read"], words].concat())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn bytes_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("a directory");
    let size = |entry: std::io::Result<fs::DirEntry>| {
        entry
            .and_then(|entry| entry.metadata())
            .expect("there")
            .len()
    };
    entries.map(size).sum()
}

#[test]
fn a_tree_is_read_cold_and_warm_by_calls_and_maps_in_a_row_and_by_tensor() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("model");
    model(&dir);
    let all = bytes_of(&dir);

    let measured = bench(&sandbox, &[text(&dir), "--rounds", "3"]).json();

    assert_eq!(measured["bytes"], all);
    let cases = measured["measurements"].as_array().expect("an array");
    let key = |case: &Value| {
        ["cache", "way", "order"].map(|key| case[key].as_str().expect("a word").to_owned())
    };
    let mut keys: Vec<_> = cases.iter().map(key).collect();
    keys.dedup();
    assert_eq!(keys.len(), 8, "{keys:?}");
    for case in cases {
        let rounds = case["rounds"].as_array().expect("an array");
        assert_eq!(rounds.len(), 3);
        assert!(
            case["bytes_per_second"]
                .as_f64()
                .is_some_and(|rate| rate > 0.0),
            "{case}"
        );
        assert_eq!(case["ratio"], Value::Null);
        let bytes = case["bytes"].as_u64().expect("bytes");
        match case["order"].as_str() {
            Some("sequential") => assert_eq!(bytes, all),
            // The configuration, tokenizer and headers are no tensors.
            _ => assert!(bytes < all && bytes > all / 2, "{case}"),
        }
        if case["cache"] == "warm" {
            let least = rounds
                .iter()
                .map(|round| round["resident_before_bytes"].as_u64());
            assert!(
                least.min().flatten().is_some_and(|least| least >= bytes),
                "{case}"
            );
        }
    }
}

#[test]
fn two_places_are_measured_in_turn_if_they_hold_the_same_files() {
    let sandbox = Sandbox::new();
    let (one, other) = (sandbox.path("one"), sandbox.path("other"));
    model(&one);
    model(&other);
    let words = [
        text(&one),
        "--against",
        text(&other),
        "--rounds",
        "2",
        "--cache",
        "warm",
        "--way",
        "mmap",
    ];

    let measured = bench(&sandbox, &words).json();

    let cases = measured["measurements"].as_array().expect("an array");
    assert_eq!(cases.len(), 2, "{measured}");
    for case in cases {
        let rate = |value: &Value| value["bytes_per_second"].as_f64().expect("a rate");
        let ratio = rate(case) / rate(&case["against"]);
        assert!(
            (case["ratio"].as_f64().expect("a ratio") - ratio).abs() < 1e-6,
            "{case}"
        );
        assert_eq!(case["against"]["rounds"].as_array().map(Vec::len), Some(2));
    }

    fs::write(other.join("more.txt"), "x").expect("written");
    bench(&sandbox, &words).failed(
        1,
        &["more.txt", "not there in the first, 1 bytes in the second"],
    );
    let file = one.join("config.json");
    bench(&sandbox, &[text(&file), "--against", text(&other)]).failed(1, &["a file", "directory"]);
}

#[test]
fn a_table_is_for_people() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("model");
    model(&dir);
    let mut command = sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    command
        .args(["bench", "read", "--rounds", "1"])
        .arg(&dir)
        .arg("--against")
        .arg(&dir);

    let ran = super::harness::run(&mut command);

    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert!(lines[0].contains("medians of 1 round"), "{ran:?}");
    let head: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!(
        head,
        [
            "CACHE", "WAY", "ORDER", "GB/S", "SLOWEST", "FASTEST", "AGAINST", "RATIO"
        ]
    );
    assert_eq!(lines.len(), 10, "{ran:?}");
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("dir");
    fs::create_dir(&dir).expect("made");
    let refused = |words: &[&str], why: &[&str]| bench(&sandbox, words).failed(1, why);

    refused(&["/nowhere"], &["/nowhere", "No such file"]);
    refused(&[text(&dir)], &["nothing to read", "no file"]);
    fs::write(dir.join("empty.txt"), "").expect("written");
    refused(&[text(&dir)], &["only empty files"]);
    refused(
        &["/dev/null"],
        &["/dev/null", "neither a file nor a directory"],
    );

    fs::write(dir.join("config.json"), "{}").expect("written");
    refused(
        &[text(&dir), "--order", "tensor"],
        &["no file *.safetensors", "--order sequential"],
    );

    let shard = dir.join("model.safetensors");
    for (bytes, why) in [
        (b"short".to_vec(), "not even a header's length"),
        ([&[0xff; 8][..], &[0; 100]].concat(), "longer than the file"),
        (
            header(r#"{"a":{"data_offsets":[0,9]}}"#),
            "`a` does not lie in the file",
        ),
        (
            header(r#"{"a":{"dtype":"F32"}}"#),
            "`a` has no data_offsets",
        ),
        (header("{"), "EOF"),
    ] {
        fs::write(&shard, bytes).expect("written");
        refused(
            &[text(&dir)],
            &["model.safetensors is not valid safetensors", why],
        );
    }
    fs::remove_file(&shard).expect("removed");

    let pipe = dir.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    refused(&[text(&dir)], &["pipe", "neither a file nor a directory"]);
}

/// A safetensors file without data.
fn header(json: &str) -> Vec<u8> {
    let length = (json.len() as u64).to_le_bytes();
    [&length[..], json.as_bytes()].concat()
}

#[test]
fn what_stays_in_memory_is_not_called_cold() {
    let sandbox = Sandbox::new();
    let memory = tempfile::tempdir_in("/dev/shm").expect("a file system in memory");
    let file = memory.path().join("weights.bin");
    fs::write(&file, vec![7; 1 << 20]).expect("written");

    let ran = bench(
        &sandbox,
        &[
            text(&file),
            "--rounds",
            "1",
            "--cache",
            "cold",
            "--way",
            "read",
        ],
    );

    let measured = ran.json();
    let round = &measured["measurements"][0]["rounds"][0];
    assert_eq!(round["resident_before_bytes"], 1 << 20, "{measured}");
    assert!(
        ran.stderr
            .contains("1.0 MiB of 1.0 MiB could not be dropped from the page cache"),
        "{ran:?}"
    );
}
