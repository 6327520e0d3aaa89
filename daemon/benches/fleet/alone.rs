//! The same nodes without a shared tier.

use super::Setup;
use super::flow::{Ceiling, Link};
use super::world::starts;

/// When each node has the model if all of them bring it from the origin.
pub(crate) fn alone(setup: &Setup) -> Vec<f64> {
    let node = setup.speeds.node_origin.min(setup.speeds.disk);
    let ceiling = Ceiling {
        node,
        shared: node,
        stream: f64::INFINITY,
    };
    let mut link = Link::new(setup.nodes, setup.speeds.origin, ceiling, 1);
    let mut starts: Vec<f64> = starts(setup);
    starts.sort_by(f64::total_cmp);
    let (mut begun, mut ended, mut warm) = (0, Vec::new(), Vec::new());
    while warm.len() < setup.nodes {
        let end = link.next().unwrap_or(f64::INFINITY);
        match starts.get(begun).filter(|start| **start <= end) {
            Some(start) => {
                link.start(*start, begun, 0, setup.bytes as f64);
                begun += 1;
            }
            None => {
                link.ended(end, &mut ended);
                warm.extend(ended.drain(..).map(|_| end));
            }
        }
    }
    warm
}
