//! `weightctl prefetch` of a model from a loopback Hub, next to what this machine could do at best.
//!
//! ```text
//! cargo bench --bench prefetch -- [--gigabytes 4] [--shards 8] [--runs 3] [--dir DIR]
//! ```
//!
//! Prints one JSON object. `prefetch` is the release binary: resolve, fetch, verify, sync, publish.
//! The ceilings are measured in the same run: `receive` reads the same bytes over as many connections
//! and drops them, `write` writes as many bytes and syncs, `hash` is SHA-256 on one core. Processor time
//! and memory are those of the client alone.

#![allow(clippy::print_stdout, reason = "its result is what it prints")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde_json::{Value, json};
use sha2::Digest;
use weightd_standin::{Files, Hub, HubConfig, Pattern, Repo};

/// As many connections as the default of `[fetch]`.
const CONNECTIONS: usize = 64;

const PART_BYTES: u64 = 16 << 20;

struct Options {
    bytes: u64,
    shards: u64,
    runs: u32,
    dir: PathBuf,
}

fn options() -> Result<Options> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        words
            .iter()
            .position(|word| word == name)
            .and_then(|at| words.get(at + 1))
    };
    let number =
        |name: &str, default: f64| value(name).map_or(Ok(default), |text| text.parse::<f64>());
    Ok(Options {
        bytes: (number("--gigabytes", 4.0)? * 1e9) as u64,
        shards: number("--shards", 8.0)? as u64,
        runs: number("--runs", 3.0)? as u32,
        dir: value("--dir").map_or_else(std::env::temp_dir, PathBuf::from),
    })
}

fn main() -> Result<()> {
    let options = options()?;
    if std::env::args().any(|word| word == "--serve") {
        return serve(&options);
    }
    let origin = Origin::start(&options)?;
    let work = options
        .dir
        .join(format!("weightd-bench-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let result = measure(&options, &origin, &work);
    std::fs::remove_dir_all(&work)?;
    println!("{}", serde_json::to_string_pretty(&result?)?);
    Ok(())
}

fn measure(options: &Options, origin: &Origin, work: &Path) -> Result<Value> {
    // A virtual machine pays for page cache that it never used: pay before the clock runs.
    write(&work.join("warm"), options.bytes)?;
    let gigabytes = options.bytes as f64 / 1e9;
    let mut runs = Vec::new();
    let (mut receive, mut written, mut prefetch) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let received = drop_all(options, &origin.endpoint)?;
        let wrote = write(&work.join("plain"), options.bytes)?;
        let run = prefetch_once(options, &origin.endpoint, &work.join("store"))?;
        prefetch.push(run["seconds"].as_f64().context("a figure")?);
        receive.push(received);
        written.push(wrote);
        runs.push(json!({ "receive_seconds": received, "write_seconds": wrote, "prefetch": run }));
    }
    let (receive, written, prefetch) = (median(receive), median(written), median(prefetch));
    let hash = hash_once();
    let ceiling = receive
        .max(written)
        .max(gigabytes / hash / options.shards.min(cores()) as f64);
    Ok(json!({
        "gigabytes": gigabytes,
        "shards": options.shards,
        "connections": CONNECTIONS,
        "cores": cores(),
        "receive_seconds": receive,
        "write_and_sync_seconds": written,
        "hash_gigabytes_per_second_and_core": hash,
        "prefetch_seconds": prefetch,
        "prefetch_gigabytes_per_second": gigabytes / prefetch,
        "prefetch_to_ceiling": prefetch / ceiling,
        "runs": runs,
    }))
}

fn cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Runs the binary on an empty store.
fn prefetch_once(options: &Options, endpoint: &str, root: &Path) -> Result<Value> {
    let before = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let begun = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_weightctl"))
        .arg("--root")
        .arg(root)
        .args([
            "--output",
            "json",
            "prefetch",
            "hf://org/model",
            "--include",
            "*",
        ])
        .env("HF_ENDPOINT", endpoint)
        .stderr(Stdio::inherit())
        .output()?;
    let seconds = begun.elapsed().as_secs_f64();
    ensure!(output.status.success(), "weightctl failed");
    let result: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        result["bytes_fetched"].as_u64() >= Some(options.bytes),
        "it fetched too little: {result}"
    );
    let after = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let spent = |usage: nix::sys::resource::Usage| {
        (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
    };
    std::fs::remove_dir_all(root)?;
    Ok(json!({
        "seconds": seconds,
        "cpu_seconds_per_gigabyte": (spent(after) - spent(before)) / (options.bytes as f64 / 1e9),
        "peak_rss_mebibytes": after.max_rss() / 1024,
    }))
}

/// Writes and syncs `bytes` in four files at once, then deletes them.
fn write(path: &Path, bytes: u64) -> Result<f64> {
    const FILES: u64 = 4;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let one = |number: u64| -> std::io::Result<()> {
            let block = vec![number as u8 + 1; 1 << 20];
            let mut file = File::create(path.with_extension(number.to_string()))?;
            for _ in 0..bytes / FILES / block.len() as u64 {
                file.write_all(&block)?;
            }
            file.sync_data()
        };
        let threads: Vec<_> = (0..FILES)
            .map(|number| scope.spawn(move || one(number)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    for number in 0..FILES {
        std::fs::remove_file(path.with_extension(number.to_string()))?;
    }
    Ok(seconds)
}

/// GB/s of SHA-256 on one core.
fn hash_once() -> f64 {
    let block = vec![7; 256 << 10];
    let begun = Instant::now();
    let mut hasher = sha2::Sha256::new();
    for _ in 0..4000 {
        hasher.update(&block);
    }
    std::hint::black_box(hasher.finalize());
    4000.0 * block.len() as f64 / 1e9 / begun.elapsed().as_secs_f64()
}

/// Reads all shards in parts over as many connections, and drops the bytes.
fn drop_all(options: &Options, endpoint: &str) -> Result<f64> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let mut parts = Vec::new();
        for shard in 0..options.shards {
            let url = format!("{endpoint}/org/model/resolve/main/{}", name(shard));
            let answer = client.head(&url).send().await?;
            let location = answer
                .headers()
                .get("location")
                .context("a redirect")?
                .to_str()?
                .to_owned();
            let size = options.bytes / options.shards;
            parts.extend(
                (0..size)
                    .step_by(PART_BYTES as usize)
                    .map(|at| (location.clone(), at, (at + PART_BYTES).min(size) - 1)),
            );
        }
        let begun = Instant::now();
        let reads = parts.into_iter().map(|(url, first, last)| {
            let request = client
                .get(url)
                .header("range", format!("bytes={first}-{last}"));
            async move {
                let mut body = request.send().await?.bytes_stream();
                while let Some(bytes) = body.next().await {
                    std::hint::black_box(bytes?);
                }
                anyhow::Ok(())
            }
        });
        let mut reads = futures::stream::iter(reads).buffer_unordered(CONNECTIONS);
        while let Some(read) = reads.next().await {
            read?;
        }
        Ok(begun.elapsed().as_secs_f64())
    })
}

fn name(shard: u64) -> String {
    format!("shard-{shard:05}.bin")
}

/// The Hub, in a process of its own so that its work is not counted.
struct Origin {
    child: Child,
    endpoint: String,
}

impl Origin {
    fn start(options: &Options) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--serve",
                "--gigabytes",
                &(options.bytes as f64 / 1e9).to_string(),
            ])
            .args(["--shards", &options.shards.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut endpoint = String::new();
        BufReader::new(child.stdout.take().context("its stdout")?).read_line(&mut endpoint)?;
        Ok(Self {
            child,
            endpoint: endpoint.trim().to_owned(),
        })
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves the model until stdin closes.
fn serve(options: &Options) -> Result<()> {
    let size = options.bytes / options.shards;
    let mut files = Files::new().file("config.json", "{}");
    for shard in 0..options.shards {
        let pattern = Pattern::Noise(shard);
        files = files.lfs_pattern(&name(shard), pattern, size, Some(&pattern.sha256(size)));
    }
    let hub = Hub::spawn_thread(HubConfig::default())?;
    hub.add_repo(Repo::new("org/model").commit("main", files));
    println!("{}", hub.endpoint());
    std::io::stdout().flush()?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}
