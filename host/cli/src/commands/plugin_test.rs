//! `galerne plugin test`: a plugin's own cases against a real host with a tiny model, and what its calls took.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use galerne_core::deployment::Deployment;
use galerne_core::filter::RequestInfo;
use galerne_core::guest::{GuestLoader, ToolFactory};
use galerne_core::limits::HostLimits;
use galerne_plugin::{PluginHost, PluginOptions};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::plugin::crate_name;
use super::test_host::{Host, galerne};
use crate::capabilities::Services;
use crate::tiny_model;

/// Options of `galerne plugin test`.
#[derive(Debug, Args)]
pub(super) struct TestArgs {
    /// The plugin's folder, with tests.toml, deployment.toml and the built component
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Only cases whose names contain this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// The tiny model's name, and the deployment's.
const MODEL: &str = "tiny";
const DEPLOYMENT: &str = "under-test";
/// Output tokens of a case that says nothing else.
const TOKENS_MAX: u32 = 16;

/// `tests.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    case: Vec<Case>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// Instead of the deployment's parameters for the plugin.
    params: Option<Map<String, Value>>,
    /// What a client asks.
    request: Option<String>,
    /// What the model is made to say, each time it is asked.
    answer: Option<String>,
    /// Instead of a request: the function to call.
    call: Option<String>,
    /// With these arguments.
    #[serde(default)]
    arguments: Map<String, Value>,
    #[serde(default)]
    expect: Expect,
}

/// What is not named is not looked at, but for the status, which is 200.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    status: Option<u16>,
    /// All of the answer.
    answer: Option<String>,
    /// A part of the answer.
    contains: Option<String>,
    /// A part of the error.
    error: Option<String>,
    /// The name of an event of a pipeline.
    event: Option<String>,
    /// Output tokens.
    tokens: Option<u64>,
}

/// What a case came to.
#[derive(Debug, Default)]
struct Outcome {
    status: u16,
    answer: String,
    error: String,
    events: Vec<String>,
    tokens: u64,
    /// Of the plugin's calls.
    fuel: u64,
}

pub(super) fn run(args: &TestArgs) -> Result<()> {
    let plugin = Plugin::read(&args.folder)?;
    let wanted = |case: &&Case| args.only.as_ref().is_none_or(|only| case.name.contains(only));
    let cases: Vec<&Case> = plugin.cases.iter().filter(wanted).collect();
    ensure!(
        !cases.is_empty(),
        "no case to run in {}",
        args.folder.join("tests.toml").display()
    );
    let mut bench = Bench::new(&plugin)?;
    let mut failed = 0;
    let mut fuel_spent = 0;
    for case in &cases {
        let begin = Instant::now();
        let result = bench.run(case).and_then(|outcome| {
            check(&case.expect, &outcome)?;
            Ok(outcome.fuel)
        });
        let took_ms = begin.elapsed().as_secs_f64() * 1e3;
        match result {
            Ok(fuel) => {
                fuel_spent += fuel;
                println!("ok      {} ({took_ms:.0} ms, {fuel} fuel)", case.name);
            }
            Err(error) => {
                failed += 1;
                println!(
                    "FAILED  {} ({took_ms:.0} ms)\n        {}",
                    case.name,
                    crate::report(&error)
                );
            }
        }
    }
    bench.say_use(fuel_spent)?;
    ensure!(failed == 0, "{failed} of {} cases failed", cases.len());
    println!("all {} cases hold", cases.len());
    Ok(())
}

/// A plugin's folder.
struct Plugin {
    name: String,
    component: Vec<u8>,
    deployment: Deployment,
    cases: Vec<Case>,
}

impl Plugin {
    fn read(folder: &Path) -> Result<Self> {
        let name = crate_name(folder)?;
        let file = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let cases: Cases = toml::from_str(&file("tests.toml")?).context("tests.toml")?;
        let component = folder.join(format!("{name}.wasm"));
        let component = std::fs::read(&component).with_context(|| {
            format!(
                "read {}; build it first, with `galerne plugin build`",
                component.display()
            )
        })?;
        let mut deployment: Deployment =
            toml::from_str(&file("deployment.toml")?).context("deployment.toml")?;
        MODEL.clone_into(&mut deployment.model);
        DEPLOYMENT.clone_into(&mut deployment.name);
        ensure!(
            deployment.guests().any(|(_, guest)| guest.plugin == name),
            "deployment.toml: expected a guest with plugin = \"{name}\", got none"
        );
        Ok(Self {
            name,
            component,
            deployment,
            cases: cases.case,
        })
    }

    /// The deployment with a case's parameters.
    fn deployment(&self, case: &Case) -> Deployment {
        let mut deployment = self.deployment.clone();
        if let Some(params) = &case.params {
            let own = deployment.guests_mut().filter(|guest| guest.plugin == self.name);
            own.for_each(|guest| guest.params.clone_from(params));
        }
        deployment
    }
}

/// A host with the tiny model, and the plugin in it.
struct Bench<'a> {
    plugin: &'a Plugin,
    data: tempfile::TempDir,
    host: Host,
    /// The plugin as a tool, once a case calls it, and the host it is called by.
    tool: Option<(PluginHost, Arc<dyn ToolFactory>)>,
}

impl<'a> Bench<'a> {
    fn new(plugin: &'a Plugin) -> Result<Self> {
        let data = tempfile::tempdir().context("make a folder for the test's host")?;
        let source = data.path().join("source");
        tiny_model::write(&source)?;
        let folder = data.path().display().to_string();
        let import = ["model", "import", &source.display().to_string(), "--name", MODEL];
        galerne(&import, &folder)?;
        let host = Host::start(&folder)?;
        let path = format!("/v1/admin/plugins?name={}&version=0.0.1", plugin.name);
        host.admin(data.path(), &path, &plugin.component)?;
        Ok(Self {
            plugin,
            data,
            host,
            tool: None,
        })
    }

    fn run(&mut self, case: &Case) -> Result<Outcome> {
        match (&case.request, &case.call) {
            (Some(request), None) => self.ask(case, request),
            (None, Some(function)) => self.call(case, function),
            _ => bail!("expected either request or call"),
        }
    }

    fn ask(&self, case: &Case, request: &str) -> Result<Outcome> {
        let deployment = toml::to_string(&self.plugin.deployment(case))?;
        self.host
            .admin(self.data.path(), "/v1/admin/deployments", deployment.as_bytes())?;
        let mut body = json!({"model": DEPLOYMENT, "temperature": 0, "seed": 1,
            "messages": [{"role": "user", "content": request}]});
        match &case.answer {
            // Nothing else is left to the model; a token is a byte.
            Some(answer) => {
                body["guided_grammar"] = json!(format!("start: {}", json!(answer)));
                body["max_tokens"] = json!(answer.len() + 1);
            }
            None => {
                body["max_tokens"] = json!(TOKENS_MAX);
                body["ignore_eos"] = json!(true);
            }
        }
        let fuel = self.fuel_of_requests()?;
        let (status, text) =
            self.host
                .ask("POST", "/v1/chat/completions", None, body.to_string().as_bytes())?;
        let fuel = self.fuel_of_requests()? - fuel;
        let said: Value = serde_json::from_str(&text).with_context(|| format!("read the answer {text}"))?;
        let message = &said["choices"][0]["message"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let events = message["pipeline_events"].as_array().into_iter().flatten();
        Ok(Outcome {
            status,
            answer: text(&message["content"]),
            error: text(&said["error"]["message"]),
            events: events.map(|event| text(&event["name"])).collect(),
            tokens: said["usage"]["completion_tokens"].as_u64().unwrap_or(0),
            fuel,
        })
    }

    /// A tool's function, with what its deployment grants.
    fn call(&mut self, case: &Case, function: &str) -> Result<Outcome> {
        let deployment = self.plugin.deployment(case);
        let (host, tool) = match &self.tool {
            Some(tool) => tool,
            None => {
                let services = Services::new(self.data.path(), Vec::new(), HostLimits::default());
                let capabilities = services.capabilities("default", &deployment)?;
                let options = PluginOptions {
                    count_fuel: true,
                    ..PluginOptions::default()
                };
                let host = PluginHost::new(options)?.with_capabilities(capabilities);
                let tool = host.load_tool(&self.plugin.name, &self.plugin.component)?;
                self.tool.insert((host, tool))
            }
        };
        let own = deployment
            .tools
            .iter()
            .find(|guest| guest.plugin == self.plugin.name);
        let params = own.map_or_else(|| "{}".to_owned(), |guest| guest.params_json());
        let info = RequestInfo {
            id: "test".to_owned(),
            model: DEPLOYMENT.to_owned(),
        };
        let arguments = Value::Object(case.arguments.clone()).to_string();
        let spent = |host: &PluginHost| host.fuel().iter().map(|(_, fuel)| fuel).sum::<u64>();
        let fuel = spent(host);
        let called = tool.session(&params, &info)?.call(function, &arguments);
        let mut outcome = Outcome {
            status: 200,
            fuel: spent(host) - fuel,
            ..Outcome::default()
        };
        match called {
            Ok(answer) => outcome.answer = answer,
            Err(error) => outcome.error = error.to_string(),
        }
        Ok(outcome)
    }

    /// What the plugin's calls within requests have executed so far.
    fn fuel_of_requests(&self) -> Result<u64> {
        let metrics = self.host.metrics()?;
        Ok(metrics.whole(&format!(
            "galerne_guest_fuel_total{{guest=\"{}\"}}",
            self.plugin.name
        )))
    }

    /// What the plugin's calls took of the host.
    fn say_use(&self, fuel: u64) -> Result<()> {
        let metrics = self.host.metrics()?;
        let called = self
            .tool
            .as_ref()
            .map(|(host, _)| GuestLoader::stats(host))
            .unwrap_or_default();
        let busy_ms = metrics.real("galerne_guest_busy_seconds_total") * 1e3 + called.busy_us as f64 / 1e3;
        let memory = metrics
            .real("galerne_guest_memory_peak_bytes")
            .max(called.memory_peak_bytes as f64);
        println!(
            "guests took {busy_ms:.1} ms in all their calls and at most {:.1} MiB of memory; {} spent {fuel} fuel in these cases",
            memory / f64::from(1 << 20),
            self.plugin.name
        );
        Ok(())
    }
}

fn check(expect: &Expect, outcome: &Outcome) -> Result<()> {
    let wanted = expect.status.unwrap_or(200);
    ensure!(
        outcome.status == wanted,
        "expected status {wanted}, got {} {}",
        outcome.status,
        if outcome.error.is_empty() {
            &outcome.answer
        } else {
            &outcome.error
        }
    );
    if let Some(answer) = &expect.answer {
        let got = if outcome.error.is_empty() {
            &outcome.answer
        } else {
            &outcome.error
        };
        ensure!(
            *answer == outcome.answer,
            "expected the answer {answer:?}, got {got:?}"
        );
    }
    if let Some(part) = &expect.contains {
        ensure!(
            outcome.answer.contains(part),
            "expected {part:?} in the answer, got {:?}",
            outcome.answer
        );
    }
    if let Some(part) = &expect.error {
        ensure!(
            outcome.error.contains(part),
            "expected {part:?} in the error, got {:?}",
            outcome.error
        );
    }
    if let Some(event) = &expect.event {
        ensure!(
            outcome.events.contains(event),
            "expected an event {event:?}, got {:?}",
            outcome.events
        );
    }
    if let Some(tokens) = expect.tokens {
        ensure!(
            outcome.tokens == tokens,
            "expected {tokens} output tokens, got {}",
            outcome.tokens
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_and_did_not_come_is_told() {
        let outcome = || Outcome {
            status: 200,
            answer: "Paris.".to_owned(),
            events: vec!["draft".to_owned()],
            tokens: 6,
            ..Outcome::default()
        };
        let expect = |toml: &str| -> Expect { toml::from_str(toml).expect("it parses") };
        for fine in [
            "",
            "answer = \"Paris.\"",
            "contains = \"Par\"",
            "event = \"draft\"",
            "tokens = 6",
        ] {
            check(&expect(fine), &outcome()).expect(fine);
        }
        for (wrong, words) in [
            ("status = 403", "expected status 403, got 200 Paris."),
            (
                "answer = \"Lyon.\"",
                "expected the answer \"Lyon.\", got \"Paris.\"",
            ),
            ("contains = \"Lyon\"", "expected \"Lyon\""),
            ("error = \"x\"", "expected \"x\" in the error"),
            ("event = \"x\"", "got [\"draft\"]"),
            ("tokens = 5", "expected 5 output tokens, got 6"),
        ] {
            let error = check(&expect(wrong), &outcome()).expect_err(wrong);
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
