//! Measuring one case, round after round.

use std::fs::File;
use std::time::Instant;

use anyhow::Context;
use weightd_core::page_cache;

use super::files::{BenchFile, Tree};
use super::{Cache, Order, Way};

/// Bytes that are read at a time, as a loader moves them on: 8 MiB.
const BUFFER_BYTES: usize = 8 << 20;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) cache: Cache,
    pub(super) way: Way,
    pub(super) order: Order,
}

/// What came out.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) case: Case,
    /// Read in one round.
    pub(super) bytes: u64,
    /// The rounds at each place.
    pub(super) sides: Vec<Vec<Round>>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    pub(super) seconds: f64,
    /// What of the files was in the page cache before; `None` if the kernel does not tell.
    pub(super) resident_before: Option<u64>,
}

impl Measured {
    /// The first place's rate by that of the second, if there are two.
    pub(super) fn ratio(&self) -> Option<f64> {
        let other = self.sides.get(1)?;
        Some(median(other) / median(&self.sides[0]))
    }
}

/// The median of the rounds' seconds.
pub(super) fn median(rounds: &[Round]) -> f64 {
    let mut seconds: Vec<f64> = rounds.iter().map(|round| round.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.len() / 2;
    match seconds.len() % 2 {
        0 => (seconds[middle - 1] + seconds[middle]) / 2.0,
        _ => seconds[middle],
    }
}

/// Measures a case at one place, or at two in turn. `tick` is called after each round.
pub(super) fn measure(
    case: Case,
    sides: &[&Tree],
    rounds: u32,
    tick: &mut dyn FnMut(),
) -> anyhow::Result<Measured> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut measured = Measured {
        case,
        bytes: 0,
        sides: vec![Vec::new(); sides.len()],
    };
    if case.cache == Cache::Warm {
        for tree in sides {
            pass(case, tree, &mut buffer)?;
        }
    }
    for round in 0..rounds as usize {
        for turn in 0..sides.len() {
            // Who is first changes, so that nobody always comes after the other.
            let side = (turn + round) % sides.len();
            let tree = sides[side];
            let resident_before = prepare(case, tree)?;
            let begun = Instant::now();
            measured.bytes = pass(case, tree, &mut buffer)?;
            let seconds = begun.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
            measured.sides[side].push(Round {
                seconds,
                resident_before,
            });
        }
        tick();
    }
    Ok(measured)
}

/// The files that a case reads.
fn files(case: Case, tree: &Tree) -> impl Iterator<Item = &BenchFile> {
    let all = case.order == Order::Sequential;
    tree.files
        .iter()
        .filter(move |file| all || file.is_safetensors)
}

/// Drops what is to be cold; returns what is in the page cache then.
fn prepare(case: Case, tree: &Tree) -> anyhow::Result<Option<u64>> {
    let mut resident = Some(0);
    for bench in files(case, tree) {
        let file = bench.open()?;
        let asked = || -> std::io::Result<Option<u64>> {
            if case.cache == Cache::Cold {
                page_cache::drop_cached(&file)?;
            }
            match page_cache::is_told(&file)? {
                true => page_cache::resident(&file, 0, u64::MAX).map(Some),
                false => Ok(None),
            }
        };
        let path = bench.path.display();
        let asked =
            asked().with_context(|| format!("cannot look what of {path} is in the page cache"))?;
        resident = resident.zip(asked).map(|(sum, bytes)| sum + bytes);
    }
    Ok(resident)
}

/// Reads it all once; returns how many bytes that were.
fn pass(case: Case, tree: &Tree, buffer: &mut [u8]) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for bench in files(case, tree) {
        let file = bench.open()?;
        bytes += read(case, bench, &file, buffer)?;
    }
    Ok(bytes)
}

fn read(case: Case, bench: &BenchFile, file: &File, buffer: &mut [u8]) -> anyhow::Result<u64> {
    let parts = match case.order {
        Order::Sequential => std::iter::once(0..bench.bytes).collect(),
        Order::Tensor => bench.tensors(file)?,
    };
    let mut bytes = 0;
    for part in parts {
        let length = part.end - part.start;
        let read = match case.way {
            Way::Read => page_cache::read(file, part.start, length, buffer),
            Way::Mmap => page_cache::copy_mapped(file, part.start, length, buffer),
        };
        read.with_context(|| format!("cannot read {}", bench.path.display()))?;
        bytes += length;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let rounds = |seconds: &[f64]| {
            let round = |seconds: &f64| Round {
                seconds: *seconds,
                resident_before: None,
            };
            seconds.iter().map(round).collect::<Vec<_>>()
        };
        let measured = Measured {
            case: Case {
                cache: Cache::Cold,
                way: Way::Read,
                order: Order::Tensor,
            },
            bytes: 1,
            sides: vec![rounds(&[9.0, 2.0, 1.0]), rounds(&[1.0, 1.0, 3.0, 2.0])],
        };

        assert_eq!(measured.ratio(), Some(0.75));
    }
}
