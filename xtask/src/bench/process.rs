//! Running the measured programs: their output, and the most memory they held.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// How often a running program's peak memory is looked at.
const POLL: Duration = Duration::from_millis(20);

/// What a program that ended well left.
pub(super) struct Finished {
    pub(super) stdout: String,
    /// The most resident memory it ever had, in bytes, up to 20 ms before its end.
    pub(super) peak_bytes: f64,
}

/// Runs a program to its end, its chatter kept back unless it fails.
pub(super) fn finish(command: &mut Command) -> Result<Finished> {
    let name = name(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let mut stdout = child.stdout.take().context("the program's output")?;
    let mut stderr = child.stderr.take().context("the program's messages")?;
    let output = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let messages = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut peak_bytes = 0.0;
    let status = loop {
        peak_bytes = self::peak_bytes(&child).unwrap_or(peak_bytes);
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(POLL);
    };
    let messages = messages.join().unwrap_or_default();
    if !status.success() {
        bail!("{name} ended with {status}:\n{}", tail(&messages));
    }
    let stdout = match output.join() {
        Ok(text) => text.with_context(|| format!("read the output of {name}"))?,
        Err(_) => bail!("reading the output of {name} panicked"),
    };
    Ok(Finished { stdout, peak_bytes })
}

/// The most resident memory a running process ever had, where the kernel tells.
pub(super) fn peak_bytes(child: &Child) -> Option<f64> {
    parse_peak(&std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?)
}

fn parse_peak(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1_024.0)
}

pub(super) fn name(command: &Command) -> String {
    PathBuf::from(command.get_program()).file_name().map_or_else(
        || "a program".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_high_water_mark() {
        let status = "Name:\tllama-bench\nVmPeak:\t  900000 kB\nVmHWM:\t  250000 kB\nVmRSS:\t  120000 kB\n";
        assert_eq!(parse_peak(status), Some(256_000_000.0));
        assert_eq!(parse_peak("Name:\tzombie\n"), None);
    }

    #[test]
    fn a_failing_program_shows_its_messages() {
        let error = finish(Command::new("sh").args(["-c", "echo no such model >&2; exit 3"]))
            .err()
            .expect("it fails");
        assert!(format!("{error:#}").contains("no such model"), "{error:#}");
    }
}
