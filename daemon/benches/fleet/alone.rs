//! The same nodes without a shared tier.

use super::Setup;
use super::flow::{Ceiling, Link};
use super::world::{origin, starts};

/// When each node has the model if all of them bring it from the origin.
pub(crate) fn alone(setup: &Setup) -> Vec<f64> {
    let ceilings = (0..setup.nodes).map(|node| Ceiling {
        stream: f64::INFINITY,
        ..origin(setup, node)
    });
    let mut link = Link::new(setup.speeds.origin, ceilings.collect(), 1);
    let mut starts: Vec<(usize, f64)> = starts(setup).into_iter().enumerate().collect();
    starts.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut coming = starts.into_iter().peekable();
    let (mut ended, mut warm) = (Vec::new(), Vec::new());
    while warm.len() < setup.nodes {
        let end = link.next().unwrap_or(f64::INFINITY);
        match coming.next_if(|(_, start)| *start <= end) {
            Some((node, start)) => link.start(start, node, 0, setup.bytes as f64),
            None => {
                link.ended(end, &mut ended);
                warm.extend(ended.drain(..).map(|_| end));
            }
        }
    }
    warm
}
