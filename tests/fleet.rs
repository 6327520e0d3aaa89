//! Fleets of nodes by a virtual clock, around the real choices and claims: what the shared tier promises.

use std::time::Duration;

use weightd_core::shared::choice::Egress;

#[path = "../daemon/benches/fleet/sim.rs"]
mod sim;

use sim::{Outcome, Setup, Speeds};

/// Eight nodes, each with 100 MB/s from the origin; the tier gives each ten times as much.
fn fleet() -> Setup {
    Setup {
        nodes: 8,
        bytes: 4_000_000_000,
        shards: 8,
        segment: 16 << 20,
        egress: Egress::Once,
        speeds: Speeds {
            node_origin: 100e6,
            origin: f64::INFINITY,
            connection: 50e6,
            node_tier: 1e9,
            tier_read: 8e9,
            tier_write: 8e9,
            stream: 500e6,
            disk: 2e9,
            hash: 1.5e9,
            origin_latency: Duration::from_millis(20),
            tier_latency: Duration::from_millis(1),
            sync: Duration::from_millis(10),
            metadata: f64::INFINITY,
        },
        slow: 0,
        slow_origin: 0.0,
        spread: Duration::from_millis(100),
        kill: 0,
        kill_within: Duration::from_secs(5),
        claim_timeout: Duration::from_secs(15),
        stall_timeout: Duration::from_secs(5),
        seed: 1,
    }
}

fn run(setup: &Setup) -> Outcome {
    sim::run(setup).expect("the simulation ends")
}

fn last(warm: &[f64]) -> f64 {
    *warm.last().expect("a node that lives")
}

#[test]
fn each_byte_leaves_the_origin_once_and_all_nodes_share_the_work() {
    let setup = fleet();

    let outcome = run(&setup);

    let (bytes, nodes) = (setup.bytes as f64, setup.nodes as f64);
    let egress = outcome.origin_bytes / bytes;
    assert!(egress <= 1.02, "{egress}");
    let together = bytes / (nodes * setup.speeds.node_origin);
    let rest = bytes * (nodes - 1.0) / nodes / setup.speeds.node_tier;
    let bound = (together + rest) * 1.2;
    let last = last(&outcome.warm);
    assert!(last <= bound, "{last} s, more than {bound} s");
    assert!(outcome.filled.is_some(), "{outcome:?}");
    assert!(last < sim::alone(&setup)[0] / 4.0, "{last} s");
}

#[test]
fn a_node_that_dies_costs_no_more_than_its_silence_and_its_segments() {
    let setup = fleet();
    let unharmed = last(&run(&setup).warm);
    for seed in 1..=3 {
        let harmed = Setup {
            kill: 2,
            seed,
            ..setup
        };

        let outcome = run(&harmed);

        assert_eq!(outcome.warm.len(), 6, "{outcome:?}");
        // Then whoever waits looks, and brings what was lost.
        let bound = unharmed + setup.claim_timeout.as_secs_f64() + 5.0;
        let last = last(&outcome.warm);
        assert!(last <= bound, "{last} s, {unharmed} s with all of them");
        let egress = outcome.origin_bytes / setup.bytes as f64;
        assert!(egress <= 1.1, "{egress}");
    }
}

#[test]
fn a_run_depends_on_nothing_but_its_seed() {
    let setup = Setup {
        bytes: 500_000_000,
        ..fleet()
    };
    let runs = [1, 1, 2].map(|seed| run(&Setup { seed, ..setup }));
    assert_eq!(runs[0].warm, runs[1].warm);
    assert_eq!(runs[0].requests, runs[1].requests);
    assert_ne!(runs[0].warm, runs[2].warm);
}
