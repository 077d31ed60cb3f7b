//! `cargo xtask test`: everything CI checks, in order of how fast it fails.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::{cargo, demo, guests, kernels, languages, venv, workspace_root};

/// Independent clients for the end-to-end tests, pinned.
const PYTHON_CLIENTS: [&str; 2] = ["aioquic==1.7.2", "openai==3.52.0"];

#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// Leave out formatting and lints.
    #[arg(long)]
    no_lint: bool,
}

pub(crate) fn run(args: &TestArgs) -> Result<()> {
    if !args.no_lint {
        step("format", cargo_with(&["fmt", "--all", "--check"]))?;
    }
    guests::build_all()?;
    if let Err(missing) = kernels::build_and_check()? {
        eprintln!("SKIPPED: CUDA kernels: {missing:#}");
    }
    let model = demo::fetch_model()?;
    let python = venv::bin("python-clients", &PYTHON_CLIENTS)?.join("python");
    for missing in languages::build_all()? {
        eprintln!("SKIPPED: {missing:#}");
    }
    if !args.no_lint {
        step(
            "lints",
            cargo_with(&[
                "clippy",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]),
        )?;
    }
    let mut tests = cargo_with(&["test", "--workspace"]);
    tests
        .env("GALERNE_TEST_GGUF", model)
        .env("GALERNE_TEST_PYTHON", python);
    step("tests", tests)?;
    if !args.no_lint {
        let mut docs = cargo_with(&["doc", "--workspace", "--no-deps", "--quiet"]);
        docs.env("RUSTDOCFLAGS", "-D warnings");
        step("docs", docs)?;
    }
    Ok(())
}

fn cargo_with(args: &[&str]) -> Command {
    let mut command = Command::new(cargo());
    command.args(args).current_dir(workspace_root());
    command
}

fn step(name: &str, mut command: Command) -> Result<()> {
    eprintln!("xtask: {name}");
    let begin = Instant::now();
    let status = command.status()?;
    ensure!(status.success(), "{name} failed: {command:?}");
    eprintln!("xtask: {name} passed in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}
