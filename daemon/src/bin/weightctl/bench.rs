//! `weightctl bench`: how fast this machine gives files back.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::output::{self, Output, bytes, count};
use crate::progress::Bar;

mod files;
mod rounds;

use files::Tree;
use rounds::{Case, Measured, Round};

const EXAMPLES: &str = "\
Examples:
  weightctl bench read \"$(weightctl path hf://org/model)\"
  weightctl bench read /models --against /var/lib/weightd/snapshots/ID/tree    a mount and what is behind it
  weightctl bench read model.safetensors --cache cold --way mmap --order tensor

Each figure is the median of the rounds, in 10^9 bytes a second. With --against the rounds alternate, and
RATIO is the rate of PATH by that of the other. JSON: bytes, seconds and bytes_per_second as numbers, with
every round and what of the files was in the page cache before it.";

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure how fast a file, or all files of a directory, can be read
    ///
    /// Cold rounds drop the files from the page cache before: whoever reads them next reads from the disk again. What
    /// somebody has mapped cannot be dropped; then stderr says how much that is. One thread reads into a buffer of
    /// 8 MiB, so memory is bounded whatever the size of the files. Nothing is written.
    #[command(after_help = EXAMPLES)]
    Read(ReadArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// A file, or a directory, of which all files are read in the order of their paths
    path: PathBuf,
    /// Measure the same files at another place in turn with these, such as outside of a mount
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Where the bytes are before: on the disk, or in the page cache
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Cache::Cold, Cache::Warm])]
    cache: Vec<Cache>,
    /// How they are read
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Way::Read, Way::Mmap])]
    way: Vec<Way>,
    /// In which order: from the beginning to the end, or the tensors of safetensors files by their names, each in turn,
    /// as a loader does
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Order::Sequential, Order::Tensor])]
    order: Vec<Order>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cache {
    /// Dropped from the page cache before.
    Cold,
    /// Read before.
    Warm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// By read calls.
    Read,
    /// From a map of the file.
    Mmap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    /// From the beginning to the end.
    Sequential,
    /// Tensor after tensor.
    Tensor,
}

/// As it is written on the command line.
fn word(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.expect("none is hidden").get_name().to_owned()
}

/// Measures, and prints what came out.
pub(crate) async fn run(output: Output, command: BenchCommand) -> anyhow::Result<()> {
    let BenchCommand::Read(args) = command;
    weightd_core::blocking::run(move || read(output, &args)).await
}

fn read(output: Output, args: &ReadArgs) -> anyhow::Result<()> {
    let tree = Tree::find(&args.path)?;
    let against = args.against.as_deref().map(Tree::find).transpose()?;
    if let Some(against) = &against {
        tree.must_equal(against)?;
    }
    let cases = cases(args, &tree)?;
    let sides: Vec<&Tree> = std::iter::once(&tree).chain(&against).collect();
    let bar = Bar::new(output);
    let mut measured = Vec::new();
    let (mut done, all) = (0, cases.len() as u64 * u64::from(args.rounds));
    for case in cases {
        let rounds = rounds::measure(case, &sides, args.rounds, &mut || {
            done += 1;
            bar.steps("measuring", done, all);
        });
        measured.push(rounds?);
    }
    bar.clear();
    for measured in &measured {
        tell_what_was_not_so(measured, &sides);
    }
    let value = json!({
        "path": args.path,
        "against": args.against,
        "files": tree.files.len(),
        "bytes": tree.bytes(),
        "rounds": args.rounds,
        "measurements": measured.iter().map(measured_json).collect::<Vec<_>>(),
    });
    output.result(&value, |_| text(&tree, &measured, args.rounds))
}

/// What is to be measured, in the order of the table.
fn cases(args: &ReadArgs, tree: &Tree) -> anyhow::Result<Vec<Case>> {
    let has_tensors = tree.files.iter().any(|file| file.is_safetensors);
    if !has_tensors && args.order == [Order::Tensor] {
        bail!(
            "cannot read {} by tensor: it has no file *.safetensors\nhint: --order sequential",
            args.path.display()
        );
    }
    let mut cases = Vec::new();
    for &cache in &args.cache {
        for &way in &args.way {
            for &order in &args.order {
                let case = Case { cache, way, order };
                if (has_tensors || order != Order::Tensor) && !cases.contains(&case) {
                    cases.push(case);
                }
            }
        }
    }
    if !has_tensors && args.order.contains(&Order::Tensor) {
        output::note("there is no file *.safetensors, so nothing is read by tensor");
    }
    Ok(cases)
}

/// Says where a figure is not what its name says.
fn tell_what_was_not_so(measured: &Measured, sides: &[&Tree]) {
    let Case { cache, way, order } = measured.case;
    let what = format!("{} {} {}", word(cache), word(way), word(order));
    for (side, tree) in measured.sides.iter().zip(sides) {
        let place = tree.path.display();
        let Some(told): Option<Vec<u64>> = side.iter().map(|round| round.resident_before).collect()
        else {
            output::note(&format!(
                "{what}: what of {place} is in the page cache the kernel tells only its owner and root"
            ));
            continue;
        };
        let all = tree.bytes();
        match cache {
            Cache::Cold => {
                if let Some(stayed) = told.into_iter().max().filter(|bytes| *bytes > 0) {
                    output::note(&format!(
                        "{what}: {} of {} could not be dropped from the page cache: somebody has {place} mapped, or its \
                         file system is memory",
                        bytes(stayed),
                        bytes(all),
                    ));
                }
            }
            Cache::Warm => {
                if let Some(warm) = told
                    .into_iter()
                    .min()
                    .filter(|bytes| *bytes < measured.bytes)
                {
                    output::note(&format!(
                        "{what}: only {} of {} stayed in the page cache: there is too little memory for {place}",
                        bytes(warm),
                        bytes(all),
                    ));
                }
            }
        }
    }
}

fn measured_json(measured: &Measured) -> Value {
    let Case { cache, way, order } = measured.case;
    let round = |round: &Round| json!({ "seconds": round.seconds, "resident_before_bytes": round.resident_before });
    let side = |rounds: &[Round]| {
        let seconds = rounds::median(rounds);
        json!({
            "seconds": seconds,
            "bytes_per_second": measured.bytes as f64 / seconds,
            "rounds": rounds.iter().map(round).collect::<Vec<_>>(),
        })
    };
    let mut value = side(&measured.sides[0]);
    value["cache"] = word(cache).into();
    value["way"] = word(way).into();
    value["order"] = word(order).into();
    value["bytes"] = measured.bytes.into();
    value["against"] = measured.sides.get(1).map(|rounds| side(rounds)).into();
    value["ratio"] = measured.ratio().into();
    value
}

fn text(tree: &Tree, measured: &[Measured], rounds: u32) -> String {
    let rate = |bytes: u64, seconds: f64| format!("{:.2}", bytes as f64 / 1e9 / seconds);
    let mut head = ["CACHE", "WAY", "ORDER", "GB/S", "SLOWEST", "FASTEST"].to_vec();
    if measured.iter().any(|measured| measured.sides.len() > 1) {
        head.extend(["AGAINST", "RATIO"]);
    }
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for measured in measured {
        let Case { cache, way, order } = measured.case;
        let (all, own) = (measured.bytes, &measured.sides[0]);
        let seconds = || own.iter().map(|round| round.seconds);
        let mut row = vec![
            word(cache),
            word(way),
            word(order),
            rate(all, rounds::median(own)),
            rate(all, seconds().fold(0.0, f64::max)),
            rate(all, seconds().fold(f64::INFINITY, f64::min)),
        ];
        if let (Some(other), Some(ratio)) = (measured.sides.get(1), measured.ratio()) {
            row.extend([rate(all, rounds::median(other)), format!("{ratio:.3}")]);
        }
        rows.push(row);
    }
    let files = count(tree.files.len() as u64, "file");
    let rounds = count(u64::from(rounds), "round");
    let path = tree.path.display();
    format!(
        "{path}: {files} of {}, medians of {rounds}\n{}",
        bytes(tree.bytes()),
        output::table(&rows)
    )
}
