//! `weightd-standin`: the stand-ins as a program, for scripts and for clients in other languages.
//!
//! Prints its endpoints as one line of JSON and runs until stdin closes or SIGTERM comes.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use weightd_standin::{Files, Gated, Hub, HubConfig, Repo, S3Config, S3Server, generate};

/// Origins on loopback that serve models as Hugging Face and S3 do.
#[derive(Debug, Parser)]
#[command(name = "weightd-standin", version)]
struct Cli {
    #[command(subcommand)]
    origin: Origin,
}

#[derive(Debug, Subcommand)]
enum Origin {
    /// A Hugging Face Hub with its CDN.
    Hub(HubArgs),
    /// An S3 server; each directory under the root is a bucket.
    S3(S3Args),
    /// Writes a generated model to a directory and exits.
    Generate(GenerateArgs),
}

#[derive(Debug, Args)]
struct HubArgs {
    /// Serve a directory as `org/model=DIR` or, at a branch or ref, `org/model@refs/pr/1=DIR`.
    #[arg(long = "repo", value_name = "ID[@REV]=DIR", required = true)]
    repos: Vec<String>,
    /// Tag what `main` stands at, as `org/model@v1`.
    #[arg(long = "tag", value_name = "ID@TAG")]
    tags: Vec<String>,
    /// Gate a repo.
    #[arg(long, value_name = "ID")]
    gated: Vec<String>,
    /// Hide a repo.
    #[arg(long, value_name = "ID")]
    private: Vec<String>,
    /// Disable a repo.
    #[arg(long, value_name = "ID")]
    disabled: Vec<String>,
    /// A good token.
    #[arg(long = "token")]
    tokens: Vec<String>,
    /// Let a token into a gated or private repo, as `org/model=TOKEN`.
    #[arg(long = "grant", value_name = "ID=TOKEN")]
    grants: Vec<String>,
    /// Entries of a tree per page.
    #[arg(long, default_value_t = 1000)]
    page_size: usize,
    /// Where the Hub listens.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[derive(Debug, Args)]
struct S3Args {
    /// The directory whose directories are buckets.
    #[arg(long)]
    root: PathBuf,
    /// Serve requests without a signature.
    #[arg(long)]
    anonymous: bool,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[derive(Debug, Args)]
struct GenerateArgs {
    /// Where to write it.
    #[arg(long)]
    root: PathBuf,
    /// Files of weights.
    #[arg(long, default_value_t = 2)]
    shards: usize,
    /// Bytes of weights per file.
    #[arg(long, default_value_t = 1_000_000)]
    bytes_per_shard: u64,
    /// The same seed gives the same bytes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    // Before anything is printed: whoever reads the endpoints may send SIGTERM at once.
    let terminated = signal(SignalKind::terminate()).context("cannot await SIGTERM")?;
    match Cli::parse().origin {
        Origin::Hub(args) => {
            let hub = start_hub(&args).await?;
            say(&json!({"endpoint": hub.endpoint(), "cdn_endpoint": hub.cdn_endpoint()}))?;
            until_told(terminated).await
        }
        Origin::S3(args) => {
            let s3 = start_s3(&args).await?;
            say(&json!({
                "endpoint": s3.endpoint(),
                "access_key": s3.access_key(),
                "secret_key": s3.secret_key(),
            }))?;
            until_told(terminated).await
        }
        Origin::Generate(args) => {
            let files =
                generate::write_model(&args.root, args.seed, args.shards, args.bytes_per_shard)
                    .with_context(|| format!("cannot write to `{}`", args.root.display()))?;
            say(&json!({"files": files}))
        }
    }
}

fn split<'a>(text: &'a str, at: char, usage: &str) -> Result<(&'a str, &'a str)> {
    text.split_once(at)
        .ok_or_else(|| anyhow!("`{text}` is not {usage}"))
}

async fn start_hub(args: &HubArgs) -> Result<Hub> {
    let config = HubConfig {
        listen: args.listen,
        tokens: args.tokens.clone(),
        page_size: args.page_size.max(1),
        ..HubConfig::default()
    };
    let hub = Hub::start(config).await.context("cannot start the hub")?;
    for argument in &args.repos {
        let (repo, root) = split(argument, '=', "ID[@REV]=DIR")?;
        let (id, revision) = repo.split_once('@').unwrap_or((repo, "main"));
        let files = Files::new()
            .directory(root.as_ref())
            .with_context(|| format!("cannot read `{root}`"))?;
        if hub.repo(id).is_none() {
            hub.add_repo(Repo::new(id));
        }
        hub.update_repo(id, |repo| repo.commit(revision, files));
    }
    let known = |id: &str| {
        hub.repo(id)
            .map(|_| ())
            .ok_or_else(|| anyhow!("no such repo: {id}"))
    };
    for tag in &args.tags {
        let (id, tag) = split(tag, '@', "ID@TAG")?;
        known(id)?;
        hub.update_repo(id, |repo| repo.tag(tag));
    }
    for grant in &args.grants {
        let (id, token) = split(grant, '=', "ID=TOKEN")?;
        known(id)?;
        hub.update_repo(id, |repo| repo.grant(token));
    }
    for id in &args.gated {
        known(id)?;
        hub.update_repo(id, |repo| repo.gated(Gated::Auto));
    }
    for id in &args.private {
        known(id)?;
        hub.update_repo(id, Repo::private);
    }
    for id in &args.disabled {
        known(id)?;
        hub.update_repo(id, Repo::disabled);
    }
    Ok(hub)
}

async fn start_s3(args: &S3Args) -> Result<S3Server> {
    let config = S3Config {
        listen: args.listen,
        ..S3Config::default()
    };
    let s3 = S3Server::start(config)
        .await
        .context("cannot start the S3 server")?;
    let buckets = s3
        .put_directory(&args.root)
        .with_context(|| format!("cannot read `{}`", args.root.display()))?;
    if args.anonymous {
        buckets.iter().for_each(|bucket| s3.allow_anonymous(bucket));
    }
    Ok(s3)
}

fn say(line: &Value) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").context("cannot write to stdout")?;
    stdout.flush().context("cannot write to stdout")
}

/// Returns when stdin closes or SIGTERM comes.
async fn until_told(mut terminated: Signal) -> Result<()> {
    let (close, closed) = oneshot::channel();
    // A thread of its own, which dies with the process: a read of stdin cannot be cancelled.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = close.send(());
    });
    tokio::select! {
        _ = terminated.recv() => {}
        _ = closed => {}
    }
    Ok(())
}
