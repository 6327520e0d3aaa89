//! x
use crate::output::Output;
#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {}
pub(crate) async fn run(_output: Output, _args: &DemoArgs) -> anyhow::Result<()> {
    anyhow::bail!("no demo yet")
}
