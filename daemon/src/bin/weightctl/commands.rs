//! What each command does: one call to the control API, and its result printed.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use serde_json::{Value, json};
use tonic::{Status, Streaming};
use weightd_core::model::ModelRef;
use weightd_proto::weightd::v1 as wire;

use crate::Told;
use crate::args::{Cli, Command, Files, Spec};
use crate::backend::{Backend, Broken};
use crate::output::{self, Output, bytes, count, seconds};
use crate::progress::{Bar, shorten, waiting};

/// Runs the command, unless the user interrupts it.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<()> {
    let output = Output(cli.global.output);
    match cli.command {
        Command::Completions { shell } => return completions(shell),
        Command::Man { dir } => return man(dir.as_deref()),
        Command::Doctor(args) => return crate::doctor::run(output, &cli.global, &args).await,
        Command::Cluster(args) => return crate::cluster::run(output, &args).await,
        Command::Bench(command) => return crate::bench::run(output, command).await,
        Command::Gc {
            partial,
            tier,
            ref shared,
        } if crate::shared::is_meant(tier, shared, partial)? => {
            return crate::shared::gc(&cli.global, output, shared.clone()).await;
        }
        Command::Bootstrap(args) => {
            return crate::bootstrap::run(output, &cli.global, &args).await;
        }
        Command::Import { dir, copy } => {
            return crate::shared::import(&cli.global, output, dir, copy).await;
        }
        #[cfg(feature = "demo")]
        Command::Demo(demo) => return crate::demo::run(output, &demo).await,
        _ => {}
    }
    let backend = Backend::open(&cli.global).await?;
    let mut client = backend.client.clone();
    tokio::select! {
        outcome = async {
            let fetched = matches!(cli.command, Command::Prefetch { .. });
            let outcome = dispatch(&mut client, output, cli.command).await;
            backend.finish(fetched).await;
            outcome
        } => outcome.map_err(|error| backend.explain(error)),
        _ = tokio::signal::ctrl_c() => {
            output::error(backend.interrupted().await);
            std::process::exit(130);
        }
    }
}

type Client = weightd_proto::weightd::v1::control_client::ControlClient<tonic::transport::Channel>;

async fn dispatch(client: &mut Client, output: Output, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Prefetch {
            models,
            files,
            pin,
            warm,
        } => {
            let asked = |model: &ModelRef| wire::PrefetchRequest {
                model: Some(model_spec(model, &files)),
                pin: pin.clone().unwrap_or_default(),
                warm,
            };
            prefetch(client, output, models.iter().map(asked).collect()).await
        }
        Command::Ls { files } => ls(client, output, files).await,
        Command::Path { spec } => {
            let request = wire::FindRequest {
                model: Some(wire_spec(&spec)),
            };
            let found = ask(client.find(request).await)?
                .snapshot
                .unwrap_or_default();
            output.result(&json!({ "path": found.path }), |_| found.path.clone())
        }
        Command::Status => status(client, output).await,
        Command::Plan { spec } => plan(client, output, &spec).await,
        Command::Pin { spec, name } => pin(client, output, &spec, name).await,
        Command::Unpin { spec, name } => unpin(client, output, &spec, name).await,
        Command::Rm { spec } => rm(client, output, &spec).await,
        Command::Gc { partial, .. } => gc(client, output, partial).await,
        Command::Verify { model, files } => verify(client, output, model, files).await,
        #[cfg(feature = "demo")]
        Command::Demo(_) => unreachable!("it needs no backend"),
        Command::Bench(_)
        | Command::Bootstrap(_)
        | Command::Cluster(_)
        | Command::Completions { .. }
        | Command::Doctor(_)
        | Command::Import { .. }
        | Command::Man { .. }
        | Command::Wait(_) => unreachable!("they need no backend"),
    }
}

async fn pin(client: &mut Client, output: Output, spec: &Spec, name: String) -> anyhow::Result<()> {
    let request = wire::PinRequest {
        model: Some(wire_spec(spec)),
        name,
    };
    let snapshot = ask(client.pin(request).await)?.snapshot.unwrap_or_default();
    let holders = snapshot.pinned_by.join(", ");
    output.result(&snapshot_json(&snapshot), |_| {
        format!("{} is held by {holders}", snapshot.model)
    })
}

async fn unpin(
    client: &mut Client,
    output: Output,
    spec: &Spec,
    name: String,
) -> anyhow::Result<()> {
    let request = wire::UnpinRequest {
        model: Some(wire_spec(spec)),
        name: name.clone(),
    };
    let answer = ask(client.unpin(request).await)?;
    let snapshot = answer.snapshot.unwrap_or_default();
    let mut value = snapshot_json(&snapshot);
    value["released"] = answer.released.into();
    let did = if answer.released {
        "no longer holds"
    } else {
        "did not hold"
    };
    output.result(&value, |_| {
        format!("operator/{name} {did} {}", snapshot.model)
    })
}

async fn rm(client: &mut Client, output: Output, spec: &Spec) -> anyhow::Result<()> {
    let request = wire::RemoveRequest {
        model: Some(wire_spec(spec)),
    };
    let removed = ask(client.remove(request).await)?;
    let value = json!({ "snapshots": removed.snapshots, "bytes_freed": removed.bytes_freed });
    let freed = bytes(removed.bytes_freed);
    output.result(&value, |_| format!("removed {}, {freed} freed", spec.model))
}

fn wire_spec(spec: &Spec) -> wire::ModelSpec {
    model_spec(&spec.model, &spec.files)
}

fn model_spec(model: &ModelRef, files: &Files) -> wire::ModelSpec {
    let (include, exclude) = (files.include.clone(), files.exclude.clone());
    wire::ModelSpec {
        model: model.to_string(),
        include,
        exclude,
    }
}

/// An answer, or why there is none. A status without a source came from the service itself.
fn ask<T>(answer: Result<tonic::Response<T>, Status>) -> anyhow::Result<T> {
    answer.map(tonic::Response::into_inner).map_err(failed)
}

fn failed(status: Status) -> anyhow::Error {
    if std::error::Error::source(&status).is_some() {
        let detail = weightd_core::errors::Chain(&status).to_string();
        return anyhow::Error::new(Broken(detail));
    }
    anyhow::Error::new(status)
}

async fn prefetch(
    client: &mut Client,
    output: Output,
    requests: Vec<wire::PrefetchRequest>,
) -> anyhow::Result<()> {
    let several = requests.len() > 1;
    let mut failures = 0;
    for request in requests {
        let warm = request.warm;
        match prefetch_one(client, output, request).await {
            Ok(done) => {
                output.result(&prefetched_json(&done), |_| prefetched_text(&done))?;
                if warm && done.warming.is_none() {
                    output::note("it was not warmed: this daemon is ending, or older than --warm");
                }
            }
            Err(error) if several && error.is::<Status>() => {
                crate::explain(&error);
                failures += 1;
            }
            Err(error) => return Err(error),
        }
    }
    if failures > 0 {
        Err(Told.into())
    } else {
        Ok(())
    }
}

async fn prefetch_one(
    client: &mut Client,
    output: Output,
    request: wire::PrefetchRequest,
) -> anyhow::Result<wire::Prefetched> {
    use wire::prefetch_event::Event;
    let events = ask(client.prefetch(request).await)?;
    let bar = Bar::new(output);
    let done = last(events, |event| match event.event? {
        Event::Progress(progress) => {
            bar.fetch(&progress);
            None
        }
        Event::Warming(warming) => {
            bar.warm(&warming);
            None
        }
        Event::Done(done) => Some(done),
    });
    let done = done.await;
    bar.clear();
    done
}

/// Reads events until `done` finds the last one.
async fn last<T, D>(
    mut events: Streaming<T>,
    mut done: impl FnMut(T) -> Option<D>,
) -> anyhow::Result<D> {
    while let Some(event) = events.message().await.map_err(failed)? {
        if let Some(done) = done(event) {
            return Ok(done);
        }
    }
    anyhow::bail!("the service ended its answer early")
}

fn prefetched_json(done: &wire::Prefetched) -> Value {
    let snapshot = done.snapshot.clone().unwrap_or_default();
    json!({
        "model": snapshot.model,
        "snapshot": snapshot.snapshot,
        "path": snapshot.path,
        "files": snapshot.files,
        "bytes": snapshot.bytes,
        "bytes_fetched": done.bytes_fetched,
        "bytes_shared": done.bytes_shared,
        "bytes_reused": done.bytes_reused,
        "seconds": done.seconds,
        "left_out": left_out_json(done.left_out.as_ref()),
        "warming": done.warming.as_ref().map(warming_json),
    })
}

fn warming_json(warming: &wire::Warming) -> Value {
    json!({
        "model": warming.model,
        "snapshot": warming.snapshot,
        "state": warming.state().as_str_name().trim_start_matches("STATE_").to_lowercase(),
        "bytes": warming.bytes,
        "bytes_warm": warming.bytes_warm,
        "bytes_read": warming.bytes_read,
        "detail": Some(&warming.detail).filter(|detail| !detail.is_empty()),
    })
}

/// How much of a model is in the page cache.
fn warming_text(warming: &wire::Warming) -> String {
    use wire::warming::State;
    let (warm, all) = (bytes(warming.bytes_warm), bytes(warming.bytes));
    let detail = &warming.detail;
    match warming.state() {
        State::Unspecified | State::Waiting => "waits to be read into the page cache".to_owned(),
        State::Reading => format!("{warm} of {all} are in the page cache, more is being read"),
        State::Warm => format!("all {all} are in the page cache"),
        State::Partly => format!("{warm} of {all} are in the page cache: {detail}"),
        State::Failed => format!("not read into the page cache: {detail}"),
        State::Stopped => "not read into the page cache: the daemon ended".to_owned(),
    }
}

fn prefetched_text(done: &wire::Prefetched) -> String {
    let snapshot = done.snapshot.clone().unwrap_or_default();
    let moved = done.bytes_fetched + done.bytes_shared;
    let rate = bytes((moved as f64 / done.seconds.max(0.001)) as u64);
    let (all, fetched) = (bytes(moved), bytes(done.bytes_fetched));
    let (shared, reused) = (bytes(done.bytes_shared), bytes(done.bytes_reused));
    let mut how = match moved {
        0 => format!("all {reused} were already here"),
        _ => format!("{all} in {} ({rate}/s)", seconds(done.seconds)),
    };
    if done.bytes_shared > 0 {
        how.push_str(&format!(
            ", {shared} from the shared tier, {fetched} from the origin"
        ));
    }
    if moved > 0 && done.bytes_reused > 0 {
        how.push_str(&format!(", {reused} was already here"));
    }
    let mut text = format!("{}\n{how}\n", snapshot.model);
    text.push_str(&left_out_text(done.left_out.as_ref()));
    if let Some(warming) = &done.warming {
        text.push_str(&format!("{}\n", warming_text(warming)));
    }
    text.push_str(&snapshot.path);
    text
}

fn left_out_json(left_out: Option<&wire::LeftOut>) -> Value {
    let left_out = left_out.cloned().unwrap_or_default();
    json!({ "files": left_out.files, "bytes": left_out.bytes, "examples": left_out.examples })
}

fn left_out_text(left_out: Option<&wire::LeftOut>) -> String {
    let left_out = left_out.cloned().unwrap_or_default();
    if left_out.files == 0 {
        return String::new();
    }
    let more = if left_out.files > left_out.examples.len() as u64 {
        ", …"
    } else {
        ""
    };
    let examples = left_out.examples.join(", ");
    format!(
        "left out {} of {}: {examples}{more}\n",
        count(left_out.files, "file"),
        bytes(left_out.bytes)
    )
}

fn snapshot_json(snapshot: &wire::Snapshot) -> Value {
    json!({
        "model": snapshot.model,
        "snapshot": snapshot.snapshot,
        "path": snapshot.path,
        "files": snapshot.files,
        "bytes": snapshot.bytes,
        "last_used": snapshot.last_used,
        "pinned_by": snapshot.pinned_by,
    })
}

async fn ls(client: &mut Client, output: Output, with_files: bool) -> anyhow::Result<()> {
    let snapshots = ask(client.list(wire::ListRequest { with_files }).await)?.snapshots;
    let row = |snapshot: &wire::Snapshot| {
        let mut value = snapshot_json(snapshot);
        if with_files {
            let file = |file: &wire::File| json!({ "path": file.path, "bytes": file.bytes, "sha256": file.sha256 });
            value["file_list"] = snapshot.file.iter().map(file).collect();
        }
        value
    };
    let value: Vec<Value> = snapshots.iter().map(row).collect();
    output.result(&value, |_| {
        let mut rows = vec![
            ["MODEL", "FILES", "SIZE", "LAST USED", "PINNED BY"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for snapshot in &snapshots {
            let pinned = if snapshot.pinned_by.is_empty() {
                "-".to_owned()
            } else {
                snapshot.pinned_by.join(",")
            };
            let used = jiff::Timestamp::from_second(snapshot.last_used)
                .map(|at| at.to_string())
                .unwrap_or_default();
            let model = shorten(&snapshot.model);
            rows.push(vec![
                model,
                snapshot.files.to_string(),
                bytes(snapshot.bytes),
                used,
                pinned,
            ]);
            let file = |file: &wire::File| {
                vec![
                    format!("  {}", file.path),
                    String::new(),
                    bytes(file.bytes),
                    file.sha256.clone(),
                ]
            };
            rows.extend(snapshot.file.iter().map(file));
        }
        if snapshots.is_empty() {
            "nothing is here yet".to_owned()
        } else {
            output::table(&rows)
        }
    })
}

async fn status(client: &mut Client, output: Output) -> anyhow::Result<()> {
    let version = ask(client.version(wire::VersionRequest {}).await)?;
    let status = ask(client.status(wire::StatusRequest {}).await)?;
    let fetches: Vec<Value> = status.fetches.iter().map(fetch_json).collect();
    let tiers: Vec<Value> = status.tiers.iter().map(tier_json).collect();
    let warmings: Vec<Value> = status.warmings.iter().map(warming_json).collect();
    let rates = status.rates.iter();
    let rates: serde_json::Map<String, Value> = rates
        .map(|rate| (rate.way.clone(), rate.bytes_per_second.into()))
        .collect();
    let value = json!({ "version": version.version, "root": version.root, "fetches": fetches, "tiers": tiers, "rates": rates, "warmings": warmings });
    output.result(&value, |_| {
        let mut text = String::new();
        for tier in &status.tiers {
            if tier.tier == "shared" {
                text.push_str(&shared_text(tier, &status.rates));
                continue;
            }
            let used = tier.capacity_bytes.saturating_sub(tier.free_bytes);
            text.push_str(&format!(
                "{} tier at {}\n  {} in {}, {} pinned, {} partial\n  file system: {} of {} used; eviction from {} down to {}\n",
                tier.tier, tier.root,
                bytes(tier.store_bytes), count(tier.snapshots, "snapshot"), bytes(tier.pinned_bytes), bytes(tier.partial_bytes),
                bytes(used), bytes(tier.capacity_bytes), bytes(tier.high_watermark_bytes), bytes(tier.low_watermark_bytes),
            ));
        }
        if status.fetches.is_empty() {
            text.push_str("no fetch under way\n");
        }
        for fetch in &status.fetches {
            let eta = fetch.eta_seconds.map(|eta| format!(", {} left", seconds(eta))).unwrap_or_default();
            let (done, all, rate) = (bytes(fetch.bytes_done), bytes(fetch.bytes), bytes(fetch.bytes_per_second as u64));
            let wait = fetch.wait.as_ref().map(|wait| format!(", {}", waiting(wait))).unwrap_or_default();
            text.push_str(&format!("fetching {}: {done} of {all}, {rate}/s{eta}{wait}\n", shorten(&fetch.model)));
        }
        for warming in &status.warmings {
            text.push_str(&format!("{}: {}\n", shorten(&warming.model), warming_text(warming)));
        }
        text
    })
}

fn shared_text(tier: &wire::TierStatus, rates: &[wire::Rate]) -> String {
    let why = match tier.detail.as_str() {
        "" => String::new(),
        detail => format!(": {detail}"),
    };
    let mut text = format!("shared tier at {}\n  {}{why}\n", tier.root, tier.state);
    if tier.capacity_bytes > 0 {
        let used = tier.capacity_bytes.saturating_sub(tier.free_bytes);
        text.push_str(&format!(
            "  file system: {} of {} used\n",
            bytes(used),
            bytes(tier.capacity_bytes)
        ));
    }
    for rate in rates {
        let measured = bytes(rate.bytes_per_second as u64);
        text.push_str(&format!("  {}: {measured}/s\n", rate.way.replace('_', " ")));
    }
    text
}

fn fetch_json(fetch: &wire::Progress) -> Value {
    json!({
        "model": fetch.model,
        "snapshot": fetch.snapshot,
        "phase": fetch.phase().as_str_name().trim_start_matches("PHASE_").to_lowercase(),
        "files": fetch.files,
        "files_done": fetch.files_done,
        "bytes": fetch.bytes,
        "bytes_done": fetch.bytes_done,
        "bytes_fetched": fetch.bytes_fetched,
        "bytes_shared": fetch.bytes_shared,
        "bytes_per_second": fetch.bytes_per_second,
        "eta_seconds": fetch.eta_seconds,
        "elapsed_seconds": fetch.elapsed_seconds,
        "bytes_per_second_shared": fetch.bytes_per_second_shared,
        "wait": fetch.wait.as_ref().map(|wait| json!({
            "for": wait.kind().as_str_name().trim_start_matches("KIND_").to_lowercase(),
            "detail": wait.detail,
            "until": wait.until,
        })),
    })
}

fn tier_json(tier: &wire::TierStatus) -> Value {
    json!({
        "tier": tier.tier,
        "root": tier.root,
        "state": tier.state,
        "detail": Some(&tier.detail).filter(|detail| !detail.is_empty()),
        "capacity_bytes": tier.capacity_bytes,
        "used_bytes": tier.capacity_bytes.saturating_sub(tier.free_bytes),
        "free_bytes": tier.free_bytes,
        "store_bytes": tier.store_bytes,
        "pinned_bytes": tier.pinned_bytes,
        "partial_bytes": tier.partial_bytes,
        "snapshots": tier.snapshots,
        "high_watermark_bytes": tier.high_watermark_bytes,
        "low_watermark_bytes": tier.low_watermark_bytes,
        "max_bytes": tier.max_bytes,
    })
}

async fn plan(client: &mut Client, output: Output, spec: &Spec) -> anyhow::Result<()> {
    let plan = ask(client
        .plan(wire::PlanRequest {
            model: Some(wire_spec(spec)),
        })
        .await)?;
    let file = |file: &wire::PlannedFile| json!({ "path": file.path, "bytes": file.bytes, "local": file.local, "bytes_shared": file.bytes_shared });
    let value = json!({
        "model": plan.model,
        "snapshot": plan.snapshot,
        "published": plan.published,
        "files": plan.files,
        "bytes": plan.bytes,
        "bytes_local": plan.bytes_local,
        "bytes_shared": plan.bytes_shared,
        "bytes_to_fetch": plan.bytes_to_fetch,
        "evict": plan.evict,
        "evict_bytes": plan.evict_bytes,
        "bytes_short": plan.bytes_short,
        "seconds_expected": { "origin": plan.seconds_from_origin, "shared": plan.seconds_from_shared },
        "left_out": left_out_json(plan.left_out.as_ref()),
        "file_list": plan.file.iter().map(file).collect::<Vec<_>>(),
    });
    output.result(&value, |_| plan_text(&plan))
}

fn plan_text(plan: &wire::PlanResponse) -> String {
    let here = if plan.published { ", ready" } else { "" };
    let mut text = format!(
        "{}\n{} of {}: {} here{here}, {} to fetch\n",
        plan.model,
        count(plan.files, "file"),
        bytes(plan.bytes),
        bytes(plan.bytes_local),
        bytes(plan.bytes_to_fetch),
    );
    if plan.bytes_shared > 0 {
        let expected = plan
            .seconds_from_shared
            .map(|s| format!(", about {}", seconds(s)));
        let expected = expected.unwrap_or_default();
        let shared = bytes(plan.bytes_shared);
        text.push_str(&format!(
            "{shared} of that from the shared tier{expected}\n"
        ));
    }
    if let Some(expected) = plan.seconds_from_origin.filter(|_| plan.bytes_to_fetch > 0) {
        text.push_str(&format!(
            "about {} from the origin, at the rate of earlier fetches\n",
            seconds(expected)
        ));
    }
    if !plan.evict.is_empty() {
        text.push_str(&format!(
            "evicts {} ({}): {}\n",
            count(plan.evict.len() as u64, "snapshot"),
            bytes(plan.evict_bytes),
            plan.evict.join(", ")
        ));
    }
    if plan.bytes_short > 0 {
        text.push_str(&format!(
            "does not fit: {} are missing even then\n",
            bytes(plan.bytes_short)
        ));
    }
    text.push_str(&left_out_text(plan.left_out.as_ref()));
    text
}

async fn gc(client: &mut Client, output: Output, partial: bool) -> anyhow::Result<()> {
    let collected = ask(client.collect(wire::CollectRequest { partial }).await)?;
    let value = json!({
        "blobs": collected.blobs,
        "bytes_freed": collected.bytes_freed,
        "partial": collected.partial,
        "trees": collected.trees,
    });
    output.result(&value, |_| {
        let (blobs, partial) = (
            count(collected.blobs, "unused blob"),
            count(collected.partial, "partial download"),
        );
        format!(
            "removed {blobs} and {partial}, {} freed",
            bytes(collected.bytes_freed)
        )
    })
}

async fn verify(
    client: &mut Client,
    output: Output,
    model: Option<ModelRef>,
    files: Files,
) -> anyhow::Result<()> {
    use wire::verify_event::Event;
    let model = model.map(|model| model_spec(&model, &files));
    let events = ask(client.verify(wire::VerifyRequest { model }).await)?;
    let bar = Bar::new(output);
    let verified = last(events, |event| match event.event? {
        Event::Progress(progress) => {
            bar.verify(&progress);
            None
        }
        Event::Done(done) => Some(done),
    });
    let verified = verified.await;
    bar.clear();
    let verified = verified?;
    let damaged = |damaged: &wire::Damaged| {
        json!({
            "sha256": damaged.sha256,
            "got": Some(&damaged.got).filter(|got| !got.is_empty()),
            "snapshots": damaged.snapshots,
            "set_aside": Some(&damaged.set_aside).filter(|path| !path.is_empty()),
        })
    };
    let value = json!({
        "checked": verified.checked,
        "bytes": verified.bytes,
        "damaged": verified.damaged.iter().map(damaged).collect::<Vec<_>>(),
    });
    output.result(&value, |_| {
        let mut text = format!(
            "{} of {} checked\n",
            count(verified.checked, "blob"),
            bytes(verified.bytes)
        );
        for damaged in &verified.damaged {
            text.push_str(&format!(
                "damaged: {} in {}\n",
                damaged.sha256,
                damaged.snapshots.join(", ")
            ));
        }
        text
    })?;
    if verified.damaged.is_empty() {
        return Ok(());
    }
    output::error(
        "damaged blobs were set aside, and the models that hold them withdrawn\n\
         hint: prefetch those models again: only the damaged bytes are fetched",
    );
    Err(Told.into())
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "weightctl", &mut script);
    output::plain(&script)
}

fn man(dir: Option<&Path>) -> anyhow::Result<()> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page)?;
        return output::plain(&page);
    };
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("cannot write to {}", dir.display()))
}
