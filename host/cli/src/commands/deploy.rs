//! `galerne deploy`, `deployments`, `promote` and `rollback`.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use super::connect::{AdminArgs, AdminRequest};
use crate::config::DataArgs;

/// Options of `galerne deploy`.
#[derive(Debug, Args)]
#[command(
    after_help = "A deployment.toml:\n  name = \"support\"\n  model = \"smollm2\"\n  [[filters]]\n  plugin = \"pii-redact\"\n\n\
    Clients then put \"support\" in the field model."
)]
pub(super) struct DeployArgs {
    /// The deployment
    #[arg(default_value = "deployment.toml")]
    file: PathBuf,
    /// Percent of the requests that go to the new version; the others stay where they are
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=99))]
    canary: Option<u8>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Options of `galerne deployments`.
#[derive(Debug, Args)]
pub(super) struct DeploymentsArgs {
    /// Show this one in full
    name: Option<String>,
    /// Which version of it [default: the stable one]
    #[arg(long, id = "deployment-version", value_name = "N", requires = "name")]
    deployment_version: Option<u32>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Options of `galerne promote` and `galerne rollback`.
#[derive(Debug, Args)]
pub(super) struct SwitchArgs {
    /// Name of the deployment
    name: String,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn deploy(data: &DataArgs, args: &DeployArgs) -> Result<()> {
    let text = std::fs::read(&args.file).with_context(|| format!("read {}", args.file.display()))?;
    let mut request = AdminRequest::post("deployments", text);
    request
        .query
        .extend(args.canary.map(|percent| ("canary", percent.to_string())));
    let answer = args.admin.ask(data, request)?;
    let published = &answer["published"];
    let deployment = &published["deployment"];
    println!(
        "deployed {} version {}{}",
        deployment["name"].as_str().unwrap_or_default(),
        published["version"],
        traffic(&answer["traffic"])
    );
    Ok(())
}

pub(super) fn deployments(data: &DataArgs, args: &DeploymentsArgs) -> Result<()> {
    let Some(name) = &args.name else {
        let answer = args.admin.ask(data, AdminRequest::get("deployments"))?;
        let mut out = std::io::stdout().lock();
        for record in answer["data"].as_array().into_iter().flatten() {
            let name = record["name"].as_str().unwrap_or_default();
            writeln!(out, "{name}{}", traffic(record))?;
        }
        return Ok(());
    };
    let mut request = AdminRequest::get(format!("deployments/{name}"));
    let version = args
        .deployment_version
        .map(|version| ("version", version.to_string()));
    request.query.extend(version);
    let answer = args.admin.ask(data, request)?;
    println!("{}", serde_json::to_string_pretty(&answer)?);
    Ok(())
}

pub(super) fn promote(data: &DataArgs, args: &SwitchArgs) -> Result<()> {
    switch(data, args, "promote")
}

pub(super) fn rollback(data: &DataArgs, args: &SwitchArgs) -> Result<()> {
    switch(data, args, "rollback")
}

fn switch(data: &DataArgs, args: &SwitchArgs, what: &str) -> Result<()> {
    let request = AdminRequest::post(format!("deployments/{}/{what}", args.name), Vec::new());
    let answer = args.admin.ask(data, request)?;
    println!("{}{}", args.name, traffic(&answer));
    Ok(())
}

/// Which versions answer.
fn traffic(traffic: &Value) -> String {
    let canary = &traffic["canary"];
    if canary.is_null() {
        return format!(": version {} answers", traffic["stable"]);
    }
    format!(
        ": version {} answers, version {} {} % of the requests",
        traffic["stable"], canary["version"], canary["percent"]
    )
}
