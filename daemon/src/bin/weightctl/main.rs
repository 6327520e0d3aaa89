//! `weightctl`: the command line of weightd, with a daemon or without.

use std::fmt;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

mod args;
mod backend;
mod bench;
mod bootstrap;
mod cluster;
mod commands;
#[cfg(feature = "demo")]
mod demo;
mod doctor;
mod output;
mod progress;
mod shared;
mod wait;

use args::Cli;
use backend::Unreachable;

/// The command makes no sense as it was given.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl Usage {
    pub(crate) fn error(text: &str) -> anyhow::Error {
        anyhow::Error::new(Self(text.to_owned()))
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// It was told already why the command failed.
#[derive(Debug)]
pub(crate) struct Told;

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed")
    }
}

impl std::error::Error for Told {}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            let help = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return if help {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(2)
            };
        }
    };
    weightd::telemetry::start_for_command_line(cli.global.verbose);
    if let args::Command::Wait(wait) = cli.command {
        // Before anything is changed that the program it becomes would inherit.
        return match wait::run(wait) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => explain(&error),
        };
    }
    weightd::process::raise_file_limit();
    weightd::process::keep_freed_memory();
    #[cfg(feature = "demo")]
    if let args::Command::Demo(demo::DemoArgs {
        inside: Some(tree), ..
    }) = &cli.command
    {
        return match demo::inside(tree) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => explain(&error),
        };
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(commands::run(cli));
    // Blocking work that nobody waits for any more must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => explain(&error),
    }
}

fn explain(error: &anyhow::Error) -> ExitCode {
    if error.is::<Told>() {
        return ExitCode::FAILURE;
    }
    let text = match error.downcast_ref::<tonic::Status>() {
        Some(status) => status.message().to_owned(),
        None => format!("{error:#}"),
    };
    output::error(&text);
    if error.is::<Usage>() {
        ExitCode::from(2)
    } else if error.is::<Unreachable>() {
        ExitCode::from(3)
    } else {
        ExitCode::FAILURE
    }
}
