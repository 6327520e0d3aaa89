//! The command line: every command with examples that teach it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use weightd::config::{Bytes, EgressPolicy, Span};
use weightd_core::model::ModelRef;
use weightd_core::store::Holder;

const EXAMPLES: &str = "\
Examples:
  weightctl prefetch hf://org/model            the main branch, into this user's store or the daemon's
  weightctl prefetch s3://bucket/models/x      everything below that prefix
  weightctl --root /data/weightd ls            a store of your choice, without a daemon
  weightctl path hf://org/model                the directory to hand to a loader

Models:
  hf://org/name[@revision]       a Hugging Face repository; a branch, tag, refs/pr/1 or commit (main)
  s3://bucket/prefix[@revision]  what lies below a prefix
  file:///path                   a directory that holds a model

Environment:
  HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT and the AWS SDK's variables are read as everywhere.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the daemon cannot be reached.";

const BOOTSTRAP: &str = "\
Examples:
  weightctl --root /data/weightd bootstrap --wait-for /data --file /etc/weightd/prefetch
  weightctl --root /var/lib/weightd bootstrap --from user-data,tags
  weightctl --root /var/lib/weightd bootstrap --file models --stage --strict

A list is text: models between white space or commas, comments after #. Or it is TOML: tables
[[prefetch]] with model, include, exclude and pin, as in the daemon's configuration; warm is left
to the daemon.

In EC2 user data a list is a MIME part of the type text/x-weightd-prefetch, or stands in a script
between the lines `# BEGIN weightd prefetch` and `# END weightd prefetch`. Tags that hold models
are weightd.prefetch and weightd.prefetch.<anything>, if the instance shows its tags in its
metadata. Only version 2 of the metadata service is used.

JSON: one object a line for each model, with state ready, failed or staged.";

/// Brings model weights onto this machine: verified, deduplicated, ready to load.
#[derive(Debug, Parser)]
#[command(name = "weightctl", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Work on the store in DIR, without a daemon [env: WEIGHTD_ROOT]
    #[arg(long, value_name = "DIR", global = true, conflicts_with = "socket")]
    pub(crate) root: Option<PathBuf>,
    /// Talk to the daemon at PATH [env: WEIGHTD_SOCKET] [default: /run/weightd/weightd.sock]
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) socket: Option<PathBuf>,
    /// Directory of the shared tier, for work without a daemon
    #[arg(
        long,
        value_name = "DIR",
        env = "WEIGHTD_SHARED_ROOT",
        hide_env_values = true,
        global = true
    )]
    pub(crate) shared_root: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tier: TierArgs,
    /// How results are printed on stdout
    #[arg(long, value_enum, default_value_t = Format::Text, global = true)]
    pub(crate) output: Format,
    /// Say on stderr what is going on; twice for more
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
}

/// How the shared tier is used without a daemon, which has its configuration.
#[derive(Debug, Default, Args)]
pub(crate) struct TierArgs {
    /// How often a byte may leave its origin
    #[arg(
        long = "shared-egress",
        value_enum,
        env = "WEIGHTD_SHARED_EGRESS",
        global = true,
        hide = true
    )]
    pub(crate) egress: Option<EgressPolicy>,
    /// Bytes that a node claims at a time, for a shared tier that is made anew
    #[arg(
        long = "shared-segment",
        value_name = "BYTES",
        env = "WEIGHTD_SHARED_SEGMENT",
        global = true,
        hide = true
    )]
    pub(crate) segment: Option<Bytes>,
    /// Take over what a node claimed and does not go on with for so long
    #[arg(
        long = "shared-claim-timeout",
        value_name = "TIME",
        env = "WEIGHTD_SHARED_CLAIM_TIMEOUT",
        global = true,
        hide = true
    )]
    pub(crate) claim_timeout: Option<Span>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// A model and the files wanted of it.
#[derive(Debug, Clone, Args)]
pub(crate) struct Spec {
    #[arg(help = "hf://org/name[@revision], s3://bucket/prefix[@revision] or file:///path")]
    pub(crate) model: ModelRef,
    #[command(flatten)]
    pub(crate) files: Files,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Files {
    /// Take only files that match GLOB, instead of what a loader needs; may be repeated
    #[arg(long, value_name = "GLOB", value_parser = glob)]
    pub(crate) include: Vec<String>,
    /// Leave out files that match GLOB; may be repeated
    #[arg(long, value_name = "GLOB", value_parser = glob)]
    pub(crate) exclude: Vec<String>,
}

fn glob(text: &str) -> Result<String, String> {
    let parsed = weightd_core::model::Patterns::new(vec![text.to_owned()], vec![]);
    parsed
        .map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}

fn holder(text: &str) -> Result<String, String> {
    Holder::operator(text)
        .map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// This machine's.
    Local,
    /// That of all nodes.
    Shared,
}

/// What goes from the shared tier.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "With --tier shared")]
pub(crate) struct SharedGc {
    /// Remove models that no node used for so long, such as 30d
    #[arg(long, value_name = "TIME")]
    pub(crate) max_age: Option<Span>,
    /// Remove the least recently used models until the others take no more than this, such as 2TiB
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bytes: Option<Bytes>,
    /// Keep what no model needs until it has not changed for so long [default: 24h]
    #[arg(long, value_name = "TIME")]
    pub(crate) grace: Option<Span>,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fetch models, and return when they can be used
    ///
    /// Every byte is verified before it can be seen. What is here already, under whatever name, is not
    /// fetched again. An interrupted prefetch goes on where it stopped.
    #[command(after_help = "\
Examples:
  weightctl prefetch hf://org/model@v1.0
  weightctl prefetch hf://org/model --include '*.gguf'
  weightctl prefetch s3://bucket/models/x --pin serving
  weightctl prefetch hf://org/model --warm     also reads it into memory, for whoever loads it next
  weightctl --output json prefetch hf://org/a hf://org/b | jq -r .path

By default a model's safetensors, configuration, tokenizer, templates and code are taken; weights in
other formats and pickle files are left out. JSON: one object a line for each model.")]
    Prefetch {
        /// Models to fetch, one after the other
        #[arg(required = true, value_name = "MODEL")]
        models: Vec<ModelRef>,
        #[command(flatten)]
        files: Files,
        /// Hold them against eviction under this name, until `unpin --as NAME`
        #[arg(long, value_name = "NAME", value_parser = holder)]
        pin: Option<String>,
        /// Then read them into the page cache, and return when that is done. The daemon's warm.max_memory_percent
        /// says how much may be there; what is there already is not read
        #[arg(long)]
        warm: bool,
    },
    /// List the models that are here
    #[command(
        after_help = "Examples:\n  weightctl ls\n  weightctl --output json ls --files | jq '.[].file_list'"
    )]
    Ls {
        /// With their files and digests
        #[arg(long)]
        files: bool,
    },
    /// Print the directory of a model that is here; exit code 1 if it is not
    #[command(after_help = "Example:\n  vllm serve \"$(weightctl path hf://org/model)\"")]
    Path {
        #[command(flatten)]
        spec: Spec,
    },
    /// Show fetches under way and how full the store is
    Status,
    /// Say what a prefetch would do, and do nothing
    #[command(after_help = "Example:\n  weightctl plan hf://org/model@main")]
    Plan {
        #[command(flatten)]
        spec: Spec,
    },
    /// Hold a model against eviction
    #[command(after_help = "Example:\n  weightctl pin hf://org/model --as serving")]
    Pin {
        #[command(flatten)]
        spec: Spec,
        /// Who holds it
        #[arg(long = "as", value_name = "NAME", value_parser = holder)]
        name: String,
    },
    /// Let go of a model
    #[command(after_help = "Example:\n  weightctl unpin hf://org/model --as serving")]
    Unpin {
        #[command(flatten)]
        spec: Spec,
        /// Who held it
        #[arg(long = "as", value_name = "NAME", value_parser = holder)]
        name: String,
    },
    /// Remove a model, and the bytes that only it needs
    Rm {
        #[command(flatten)]
        spec: Spec,
    },
    /// Remove what no model needs: unused bytes, dead and stale partial downloads
    ///
    /// With `--tier shared` that of the shared tier, without a daemon: models that were not used for long or do
    /// not fit, and blobs that no other model needs. What a node uses now stays. It may run anywhere, at any
    /// time, also several at once, and be killed.
    #[command(after_help = "\
Examples:
  weightctl gc
  weightctl --shared-root /fsx/weightd gc --tier shared --max-age 30d --dry-run
  weightctl --shared-root /fsx/weightd gc --tier shared --max-bytes 2TiB")]
    Gc {
        /// Also what unfinished downloads could still go on with, and damaged bytes that were set aside
        #[arg(long)]
        partial: bool,
        /// Where: the store of this machine, or the tier that nodes share
        #[arg(long, value_enum, default_value_t = Tier::Local)]
        tier: Tier,
        #[command(flatten)]
        shared: SharedGc,
    },
    /// Make models of a Hugging Face cache content of the shared tier, without downloading them
    ///
    /// Every file is read once and hashed; one whose hash is not its name in the cache is left out, with the
    /// models that hold it: then the exit code is 1. Files are linked where the cache lies on the same file
    /// system, else copied. Linked files must not be changed in place afterwards (huggingface_hub never does).
    /// No daemon is needed.
    #[command(after_help = "\
Examples:
  weightctl --shared-root /fsx/weightd import /fsx/huggingface
  weightctl --shared-root /fsx/weightd import ~/.cache/huggingface/hub/models--org--model --copy")]
    Import {
        /// HF_HOME, the directory `hub` in it, or one models--org--name in that
        dir: PathBuf,
        /// Copy all files, link none
        #[arg(long)]
        copy: bool,
    },
    /// Hash what is here again; set damaged bytes aside; exit code 1 if there were any
    ///
    /// The models that hold damaged bytes are withdrawn: a prefetch brings just those bytes again.
    #[command(
        after_help = "Examples:\n  weightctl verify\n  weightctl verify hf://org/model || weightctl prefetch hf://org/model"
    )]
    Verify {
        /// Only this model; all that is here if left out
        model: Option<ModelRef>,
        #[command(flatten)]
        files: Files,
    },
    /// Wait until a pod's volume is complete, then become the given command
    ///
    /// For volumes that are mounted before they are complete (mode: async). Reads the volume only: no
    /// daemon and no network is needed. Fails at once if the volume says that it will not be complete.
    #[command(after_help = "\
Examples:
  weightctl wait --dir /models -- vllm serve /models
  weightctl wait --timeout 1800 -- python serve.py

Without this program in the container, a shell does the same:
  until [ -e /models/.weightd/complete ]; do sleep 1; done; exec vllm serve /models")]
    Wait(super::wait::WaitArgs),
    /// Bring a node's models while it boots, before the daemon is there; never fails the boot
    ///
    /// For a systemd unit. It finds a list of models, waits for the disk, and fetches into the store that the
    /// daemon will use: that one joins the work under way, and goes on with what is missing. Whatever goes wrong
    /// is said on stderr, the exit code is 0. Progress is a line every 10 s.
    #[command(after_help = BOOTSTRAP)]
    Bootstrap(super::bootstrap::BootstrapArgs),
    /// Check this node's set-up, and say how to mend it; exit code 1 if something is an error
    ///
    /// Looks at the store, the daemon, the CSI plugin, the Hub, S3, the shared tier and the machine. It works as
    /// any user, says what it cannot see, and changes nothing: what it writes to try a disk it removes again.
    Doctor(super::doctor::DoctorArgs),
    /// Measure how fast files are read
    #[command(subcommand)]
    Bench(super::bench::BenchCommand),
    /// Show which node of the cluster has which model, or how far it is, as the API server knows it
    Cluster(super::cluster::ClusterArgs),
    /// The main job on an embedded origin, offline: prefetch, read-only mount, verify, timings
    #[cfg(feature = "demo")]
    Demo(super::demo::DemoArgs),
    /// Print completions for a shell
    #[command(
        after_help = "Example:\n  weightctl completions bash > /etc/bash_completion.d/weightctl"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    #[command(after_help = "Example:\n  weightctl man --dir /usr/local/share/man/man1")]
    Man {
        /// Where to; the main page goes to stdout if left out
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_typo_is_wrong_usage_before_anything_happens() {
        for words in [
            &["prefetch"][..],
            &["prefetch", "org/model"],
            &["prefetch", "hf://org/model", "--include", "[a"],
            &["prefetch", "hf://org/model", "--pin", "a/b"],
            &["pin", "hf://org/model"],
            &["--root", "/x", "--socket", "/y", "ls"],
            &["gc", "--tier", "other"],
            &["gc", "--tier", "shared", "--max-age", "soon"],
            &["import"],
            &["bench"],
            &["bench", "read"],
            &["bench", "read", "/x", "--rounds", "0"],
            &["bench", "read", "/x", "--cache", "tepid"],
            &["frobnicate"],
        ] {
            let error =
                Cli::try_parse_from([&["weightctl"], words].concat()).expect_err("accepted");
            assert_eq!(error.exit_code(), 2, "{words:?}: {error}");
        }
    }
}
