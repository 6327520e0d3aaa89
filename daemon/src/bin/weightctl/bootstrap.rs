//! `weightctl bootstrap`: brings a node's models while the node boots, before the DaemonSet's daemon is there.
//!
//! It shares the store with that daemon, which joins the work under way: what one of them brings, the other does
//! not fetch again. Nothing that goes wrong here may keep a node from booting, so it is said, and that is all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use serde_json::{Value, json};
use tokio::time::Instant;
use weightd::config::{Config, Span};
use weightd::process::Signals;
use weightd::sources::Origins;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchError, FetchRequest, Fetched, Fetcher, Phase, Progress};
use weightd_core::metrics::Metrics;
use weightd_core::shared::SharedTier;
use weightd_core::store::Store;

use crate::args::Global;
use crate::backend::{self, Place};
use crate::output::{self, Output, bytes, seconds};
use crate::progress::shorten;
use crate::{Told, Usage};

mod imds;
mod list;
mod mount;

use list::List;

/// How long a fetch may take to let go when we are told to stop.
const STOP: Duration = Duration::from_secs(10);

/// How long what was fetched may take to be written to the shared tier, too.
const WRITE_BEHIND: Duration = Duration::from_secs(600);

/// Pauses between tries of what failed: they double from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

#[derive(Debug, clap::Args)]
pub(crate) struct BootstrapArgs {
    /// Read the list of models from FILE
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Where to look for the list: the first place that names a model is used [default: file (with --file),
    /// user-data, tags]
    #[arg(long, value_name = "PLACES", value_enum, value_delimiter = ',')]
    from: Vec<Origin>,
    /// Use the settings in FILE, which are the daemon's, and bring the models that it names as well
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Begin when a file system is mounted at DIR; a directory is not enough
    #[arg(long, value_name = "DIR")]
    wait_for: Option<PathBuf>,
    /// Bring nothing if it is not mounted after so long
    #[arg(
        long,
        value_name = "TIME",
        default_value = "10min",
        requires = "wait_for"
    )]
    timeout: Span,
    /// Try again for so long what an origin or the network keeps from us; the daemon then goes on
    #[arg(long, value_name = "TIME", default_value = "30min")]
    retry_for: Span,
    /// Say how far it is this often
    #[arg(long, value_name = "TIME", default_value = "10s")]
    report_every: Span,
    /// Only leave the list in the store, for the daemon to bring as it starts; needs no network
    #[arg(long)]
    stage: bool,
    /// Exit with 1 if something went wrong, instead of only saying so
    #[arg(long)]
    strict: bool,
}

/// Where a list of models comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Origin {
    /// The file that --file names.
    File,
    /// The instance's user data.
    UserData,
    /// The instance's tags.
    Tags,
}

/// What became of the models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Good,
    Troubled,
}

/// Brings the models, and says what became of them.
pub(crate) async fn run(
    output: Output,
    global: &Global,
    args: &BootstrapArgs,
) -> anyhow::Result<()> {
    let root = root(global, args)?;
    let ending = match boot(output, global, args, root.as_deref()).await {
        Ok(ending) => ending,
        Err(error) => {
            crate::explain(&error);
            Ending::Troubled
        }
    };
    match ending {
        Ending::Troubled if args.strict => Err(Told.into()),
        Ending::Troubled => {
            output::note("the node boots on; a daemon that starts here fetches what is missing");
            Ok(())
        }
        Ending::Good => Ok(()),
    }
}

/// The store's root as the command line has it; `None` if the configuration has it.
fn root(global: &Global, args: &BootstrapArgs) -> anyhow::Result<Option<PathBuf>> {
    let root = match backend::place(global)? {
        Place::Root(root) => Some(root),
        Place::Socket(_) => {
            return Err(Usage::error(
                "bootstrap works on a store, not through a daemon: give --root",
            ));
        }
        Place::Either => None,
    };
    if root.is_none() && args.config.is_none() {
        return Err(Usage::error(
            "say where the store is: --root DIR, or --config FILE",
        ));
    }
    if args.from.contains(&Origin::File) && args.file.is_none() {
        return Err(Usage::error("--from file needs --file FILE"));
    }
    if let (Some(root), Some(dir)) = (&root, &args.wait_for)
        && !root.starts_with(dir)
    {
        let (root, dir) = (root.display(), dir.display());
        return Err(Usage::error(&format!(
            "the store at {root} does not lie below --wait-for {dir}"
        )));
    }
    Ok(root)
}

async fn boot(
    output: Output,
    global: &Global,
    args: &BootstrapArgs,
    root: Option<&Path>,
) -> anyhow::Result<Ending> {
    let mut signals = Signals::catch()?;
    let config = settings(global, args, root)?;
    let prepared = tokio::select! {
        prepared = prepare(args, &config) => prepared?,
        () = signals.next() => {
            output::note("stopped before anything was fetched");
            return Ok(Ending::Troubled);
        }
    };
    let (requests, ending) = prepared;
    // Also without a model: the daemon's pod may wait for the store's directory.
    let (root, limits) = (config.root.clone(), config.store_limits());
    let store = blocking::run(move || Store::open(&root, limits)).await;
    let store = store.map_err(|error| {
        let hint = error.hint().map(|hint| format!("\nhint: {hint}"));
        anyhow!("{}{}", Chain(&error), hint.unwrap_or_default())
    })?;
    if requests.is_empty() {
        output::note("no model is named: nothing to do");
        return Ok(ending);
    }
    if args.stage {
        stage(output, &store, requests).await?;
        return Ok(ending);
    }
    let fetcher = fetcher(&config, store)?;
    let fetched = tokio::select! {
        fetched = fetch_all(output, &fetcher, requests, args.retry_for.0) => fetched?,
        () = report(&fetcher, args.report_every.0) => unreachable!("it never ends"),
        () = signals.next() => {
            fetcher.shutdown(STOP).await;
            output::note("stopped; what arrived is kept, and a daemon that starts here goes on with it");
            return Ok(Ending::Troubled);
        }
    };
    if let Some(tier) = fetcher.tier() {
        tier.settle(WRITE_BEHIND).await;
    }
    Ok(if ending == Ending::Good {
        fetched
    } else {
        ending
    })
}

/// The daemon's settings, with what the command line says.
fn settings(global: &Global, args: &BootstrapArgs, root: Option<&Path>) -> anyhow::Result<Config> {
    let read = args
        .config
        .as_deref()
        .map_or_else(|| Ok(Config::default()), Config::read);
    let config = read.map_err(|error| anyhow!("{}", Chain(&error)))?;
    let root = root.unwrap_or(&config.root).to_owned();
    let config = backend::settings(config, &root, global)?;
    config
        .check()
        .map_err(|error| anyhow!("{}", Chain(&error)))?;
    Ok(config)
}

/// Finds the list, and waits for the place where the store lies.
async fn prepare(
    args: &BootstrapArgs,
    config: &Config,
) -> anyhow::Result<(Vec<FetchRequest>, Ending)> {
    let list = find_list(args).await;
    for problem in &list.problems {
        output::error(problem);
    }
    let mut requests = list.requests;
    // What is to be warm is warmed by the daemon, which keeps the pages when this process is gone.
    for kept in config.kept()? {
        if !requests.contains(&kept.request) {
            requests.push(kept.request);
        }
    }
    if let Some(dir) = &args.wait_for {
        mount::wait_for(dir, args.timeout.0).await?;
    }
    let ending = if list.problems.is_empty() {
        Ending::Good
    } else {
        Ending::Troubled
    };
    Ok((requests, ending))
}

/// The list of the first place that names a model, with the problems of all that were asked.
async fn find_list(args: &BootstrapArgs) -> List {
    let by_default = [Origin::File, Origin::UserData, Origin::Tags];
    let origins: Vec<Origin> = match args.from.as_slice() {
        [] if args.file.is_none() => by_default[1..].to_vec(),
        [] => by_default.to_vec(),
        chosen => chosen.to_vec(),
    };
    let mut all = List::default();
    let client = imds::Imds::new();
    let mut away = false;
    for origin in origins {
        let (name, asked) = match origin {
            Origin::File => {
                let path = args.file.clone().unwrap_or_default();
                (
                    format!("the file {}", path.display()),
                    Ok(list::read(&path)),
                )
            }
            // What did not answer one question will not answer the next.
            _ if away => continue,
            Origin::UserData => ("the user data".to_owned(), client.user_data().await),
            Origin::Tags => ("the instance's tags".to_owned(), client.tags().await),
        };
        away |= asked.as_ref().is_err_and(|error| error.away);
        let found = asked.unwrap_or_else(|error| List::problem(error.text));
        all.problems.extend(found.problems);
        if !found.requests.is_empty() {
            let models = output::count(found.requests.len() as u64, "model");
            output::note(&format!("{name}: {models}"));
            all.requests = found.requests;
            break;
        }
    }
    all
}

fn fetcher(config: &Config, store: Arc<Store>) -> anyhow::Result<Arc<Fetcher>> {
    let directories = Some(config.file.allow.clone());
    let sources = Origins::new(config.hf_config()?, config.s3_config()?, directories)?;
    let metrics = Arc::<Metrics>::default();
    let tier = config.shared_config();
    let tier = tier.map(|config| SharedTier::new(config, Arc::clone(&metrics)));
    let limits = config.fetch_limits();
    Ok(Fetcher::with_tier(
        store,
        Arc::new(sources),
        limits,
        metrics,
        tier,
    ))
}

/// Leaves the requests in the store, where a daemon that starts finds them.
async fn stage(
    output: Output,
    store: &Arc<Store>,
    requests: Vec<FetchRequest>,
) -> anyhow::Result<()> {
    for request in requests {
        let (store, record) = (Arc::clone(store), request.clone());
        let staged = blocking::run(move || store.record_fetch(&record)).await;
        staged.map_err(|error| anyhow!("{}", Chain(&error)))?;
        let value = json!({ "model": request.model.to_string(), "state": "staged" });
        output.result(&value, |_| {
            format!(
                "{}: left for the daemon, which fetches it as it starts",
                request.model
            )
        })?;
    }
    Ok(())
}

/// Brings the models in their order: the first one is ready first. What may work later is tried again after the
/// others; what does not work by then stays on record, for the daemon.
async fn fetch_all(
    output: Output,
    fetcher: &Arc<Fetcher>,
    requests: Vec<FetchRequest>,
    patience: Duration,
) -> anyhow::Result<Ending> {
    let until = Instant::now() + patience;
    let (mut pause, longest) = PAUSES;
    let (mut waiting, mut ending) = (requests, Ending::Good);
    loop {
        let mut again = Vec::new();
        for request in waiting {
            let error = match fetcher.fetch(request.clone()).wait().await {
                Ok(fetched) => {
                    output.result(&ready_json(&request, &fetched), |_| ready_text(&fetched))?;
                    continue;
                }
                Err(error) => error,
            };
            if error.may_pass() && Instant::now() + pause < until {
                let pause = seconds(pause.as_secs_f64());
                output::note(&format!("{}; trying again in {pause}", Chain(&error)));
                again.push(request);
                continue;
            }
            output.result(&failed_json(&request, &error), |_| failed_text(&error))?;
            ending = Ending::Troubled;
        }
        if again.is_empty() {
            return Ok(ending);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
        waiting = again;
    }
}

fn ready_json(request: &FetchRequest, fetched: &Fetched) -> Value {
    let snapshot = &fetched.snapshot;
    json!({
        "model": snapshot.manifest.model.to_string(),
        "asked": request.model.to_string(),
        "state": "ready",
        "snapshot": snapshot.manifest.snapshot.to_string(),
        "path": snapshot.path.display().to_string(),
        "files": snapshot.manifest.files.len(),
        "bytes": snapshot.manifest.bytes(),
        "bytes_fetched": fetched.bytes_fetched,
        "bytes_shared": fetched.bytes_shared,
        "bytes_reused": fetched.bytes_reused,
        "seconds": fetched.seconds,
    })
}

fn ready_text(fetched: &Fetched) -> String {
    let moved = fetched.bytes_fetched + fetched.bytes_shared;
    let rate = moved as f64 / fetched.seconds.max(0.001);
    let how = match moved {
        0 => "it was already here".to_owned(),
        _ => format!(
            "{} in {} ({}/s), {} were here",
            bytes(moved),
            seconds(fetched.seconds),
            bytes(rate as u64),
            bytes(fetched.bytes_reused)
        ),
    };
    let manifest = &fetched.snapshot.manifest;
    format!(
        "{}: ready, {}: {how}",
        manifest.model,
        bytes(manifest.bytes())
    )
}

fn failed_json(request: &FetchRequest, error: &FetchError) -> Value {
    json!({
        "model": request.model.to_string(),
        "asked": request.model.to_string(),
        "state": "failed",
        "error": Chain(error).to_string(),
        "hint": error.hint(),
        "daemon_goes_on": error.may_pass(),
    })
}

fn failed_text(error: &FetchError) -> String {
    let hint = error.hint().map(|hint| format!("\nhint: {hint}"));
    let later = if error.may_pass() {
        "\nthe daemon tries again as it starts"
    } else {
        ""
    };
    format!("{}{}{later}", Chain(error), hint.unwrap_or_default())
}

/// Says now and then how far the fetches are.
async fn report(fetcher: &Fetcher, every: Duration) {
    let every = every.max(Duration::from_millis(100));
    let mut ticks = tokio::time::interval_at(Instant::now() + every, every);
    loop {
        ticks.tick().await;
        for progress in fetcher.active() {
            output::note(&progress_text(&progress));
        }
    }
}

fn progress_text(progress: &Progress) -> String {
    let doing = match progress.phase {
        Phase::Resolving => "asking the origin".to_owned(),
        Phase::WaitingForRoom => "making room".to_owned(),
        Phase::Publishing => "checking and publishing".to_owned(),
        Phase::Fetching => {
            let eta = progress.eta;
            let eta = eta.map(|eta| format!(", {} left", seconds(eta.as_secs_f64())));
            let percent = progress.bytes_done * 100 / progress.bytes.max(1);
            let (done, all) = (bytes(progress.bytes_done), bytes(progress.bytes));
            let rate = bytes(progress.bytes_per_second as u64);
            let eta = eta.unwrap_or_default();
            format!("{done} of {all} ({percent} %), {rate}/s{eta}")
        }
    };
    format!("{}: {doing}", shorten(&progress.model.to_string()))
}
