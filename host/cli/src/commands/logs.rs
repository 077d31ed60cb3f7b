//! `galerne logs`: what a deployment's guests wrote, once or as it comes.

use std::io::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use galerne_core::capability::{LogLevel, LogLine};
use galerne_store::timestamp::rfc3339_ms;

use super::connect::{AdminArgs, AdminRequest};
use crate::config::DataArgs;

/// Options of `galerne logs`.
#[derive(Debug, Args)]
#[command(
    after_help = "A guest writes to the log if its deployment grants it: log = true in the table [capabilities]. The host keeps \
    the newest lines of each deployment, of all its versions, until it ends."
)]
pub(super) struct LogsArgs {
    /// The deployment
    name: String,
    /// Go on with what comes, until the host ends or Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Begin with at most so many of the newest lines [default: all that are kept]
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<usize>,
    /// Show lines of this level and above
    #[arg(long, value_enum, default_value = "debug")]
    level: LevelArg,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LevelArg {
    Debug,
    Info,
    Warn,
    Error,
}

impl From<LevelArg> for LogLevel {
    fn from(level: LevelArg) -> Self {
        match level {
            LevelArg::Debug => Self::Debug,
            LevelArg::Info => Self::Info,
            LevelArg::Warn => Self::Warn,
            LevelArg::Error => Self::Error,
        }
    }
}

pub(super) fn run(data: &DataArgs, args: &LogsArgs) -> Result<()> {
    let mut request = AdminRequest::get(format!("deployments/{}/logs", args.name));
    request
        .query
        .extend(args.lines.map(|lines| ("lines", lines.to_string())));
    let mut shown = Shown {
        level: args.level.into(),
        last: None,
    };
    if args.follow {
        request.query.push(("follow", "true".to_owned()));
        return args.admin.follow(data, request, |line| {
            shown.line(&serde_json::from_value(line).context("read a line of the log")?)
        });
    }
    let mut answer = args.admin.ask(data, request)?;
    let lines: Vec<LogLine> = serde_json::from_value(answer["data"].take()).context("read the log")?;
    lines.iter().try_for_each(|line| shown.line(line))?;
    shown.missing_up_to(answer["last"].as_u64().unwrap_or(0))
}

/// What was printed so far.
struct Shown {
    level: LogLevel,
    last: Option<u64>,
}

impl Shown {
    fn line(&mut self, line: &LogLine) -> Result<()> {
        self.missing_up_to(line.number.saturating_sub(1))?;
        self.last = Some(line.number);
        if line.level < self.level {
            return Ok(());
        }
        let time = rfc3339_ms(UNIX_EPOCH + Duration::from_millis(line.time_ms));
        let LogLine {
            level,
            guest,
            request,
            text,
            ..
        } = line;
        writeln!(std::io::stdout(), "{time} {level:<5} {guest} {request} {text}")?;
        Ok(())
    }

    /// Says how many lines are not there between the last one and the one after `number`.
    fn missing_up_to(&mut self, number: u64) -> Result<()> {
        // Before the first that is shown nobody expects one.
        let missing = self.last.map_or(0, |last| number.saturating_sub(last));
        if missing > 0 {
            let why = "more came within a second than are taken, or than are kept";
            writeln!(std::io::stdout(), "-- {missing} lines are missing: {why}")?;
        }
        Ok(())
    }
}
