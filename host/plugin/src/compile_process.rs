//! Compiling a component in a process of its own, which is ended when it takes too long or too much: both sides.
//! Knows no world and keeps nothing.
//!
//! The component goes in over one socket and the compiled code comes back over it. A running compilation cannot be
//! stopped from within its process, so the process is what has limits.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use galerne_core::limits::{CompileLimits, GuestLimits};
use rustix::process::Signal;

use crate::artifact::Artifact;
use crate::errors::{PluginError, bounded, reasons};
use crate::runtime;
use crate::sandbox::{self, Bounds, SandboxError};

/// The sub-command of the worker's program.
const COMMAND: &str = "compile-guest";
/// Its option for code that counts what it executes.
const COUNT_FUEL: &str = "--count-fuel";
/// How a process ends whose component is not one: its reason is on standard error.
const EXIT_BROKEN: i32 = 3;
/// Bytes of a reason that are read.
const REASON_BYTES_MAX: u64 = 4 << 10;

/// Why there is no compiled code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompileError {
    /// The component, in the compiler's words.
    #[error("{0}")]
    Broken(String),
    /// A limit and its value.
    #[error("{0}")]
    Limit(String),
    /// The process, which is nothing the component must answer for.
    #[error("{0}")]
    Process(String),
}

impl CompileError {
    fn process(what: &str, error: &dyn std::fmt::Display) -> Self {
        Self::Process(format!("{what}: {error}"))
    }
}

/// Compiles `component` with `program compile-guest`. Blocks for at most the wall limit.
///
/// # Errors
/// No component, a limit, or no process; the process is gone in any case.
pub(crate) fn compile(
    program: &Path,
    limits: &CompileLimits,
    count_fuel: bool,
    component: &[u8],
) -> Result<Artifact, CompileError> {
    let started = Instant::now();
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| CompileError::process("make a socket", &error))?;
    let child = spawn(program, limits, count_fuel, theirs)
        .map_err(|error| CompileError::process(&format!("start {} {COMMAND}", program.display()), &error))?;
    let mut child = Ended(child);
    let talked = talk(ours, limits, started, component);
    let status = match &talked {
        // It closed its end, or soon will.
        Ok(_) => wait(&mut child.0, limits.wall.saturating_sub(started.elapsed())),
        Err(_) => None,
    };
    drop_alive(&mut child.0);
    match (talked, status) {
        (Ok(artifact), Some(status)) if status.success() => Ok(Artifact::trusted(artifact)),
        (Err(Talk::Size), _) => Err(CompileError::Limit(format!(
            "compiled code of at most {} bytes",
            limits.artifact_bytes_max
        ))),
        (Err(Talk::Time), _) | (Ok(_), None) => Err(CompileError::Limit(format!(
            "compiling for at most {} s",
            limits.wall.as_secs_f32()
        ))),
        (Err(Talk::Io(error)), _) => Err(CompileError::process("talk to the compiler's process", &error)),
        (Ok(_), Some(status)) => Err(ended(&mut child.0, limits, status)),
    }
}

/// Ends the process when dropped, and takes it off the system's list.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop_alive(&mut self.0);
    }
}

fn drop_alive(child: &mut Child) {
    // It fails if the process has ended, which is what is wanted.
    let _ = child.kill();
    let _ = child.wait();
}

fn spawn(program: &Path, limits: &CompileLimits, count_fuel: bool, socket: UnixStream) -> io::Result<Child> {
    let input = OwnedFd::from(socket.try_clone()?);
    Command::new(program)
        .arg(COMMAND)
        .arg(limits.cpu.as_secs().max(1).to_string())
        .arg(limits.memory_bytes_max.to_string())
        .args(count_fuel.then_some(COUNT_FUEL))
        .env_clear()
        // A terminal's Ctrl-C is for the host.
        .process_group(0)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(OwnedFd::from(socket)))
        .stderr(Stdio::piped())
        .spawn()
}

/// Why the talk ended without an artifact.
enum Talk {
    Time,
    Size,
    Io(io::Error),
}

impl From<io::Error> for Talk {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Time,
            _ => Self::Io(error),
        }
    }
}

/// Sends the component and reads the answer to its end.
fn talk(
    mut socket: UnixStream,
    limits: &CompileLimits,
    started: Instant,
    component: &[u8],
) -> Result<Vec<u8>, Talk> {
    let left = || match limits.wall.checked_sub(started.elapsed()) {
        Some(left) if !left.is_zero() => Ok(Some(left)),
        _ => Err(Talk::Time),
    };
    for part in component.chunks(1 << 20) {
        socket.set_write_timeout(left()?)?;
        match socket.write_all(part) {
            // It is gone already; what it wrote, and its status, say more than a broken pipe.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            written => written?,
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
    let mut artifact = Vec::new();
    let mut part = vec![0; 256 << 10];
    loop {
        socket.set_read_timeout(left()?)?;
        let read = match socket.read(&mut part) {
            Ok(0) => return Ok(artifact),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(artifact),
            // A process that was stopped and goes on; the time left is looked at again.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        artifact.extend_from_slice(&part[..read]);
        if artifact.len() > limits.artifact_bytes_max {
            return Err(Talk::Size);
        }
    }
}

/// How it ended, if it does within `patience`. It has nothing left to do but to end.
fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            _ => return None,
        }
    }
}

/// What a status other than success means.
fn ended(child: &mut Child, limits: &CompileLimits, status: ExitStatus) -> CompileError {
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What cannot be read says nothing.
        let _ = stderr.take(REASON_BYTES_MAX).read_to_end(&mut said);
    }
    let said = bounded(String::from_utf8_lossy(&said).trim());
    let is = |known: Signal| status.signal() == Some(known.as_raw());
    if is(Signal::XCPU) {
        return CompileError::Limit(format!(
            "compiling with at most {} s of CPU time",
            limits.cpu.as_secs()
        ));
    }
    if is(Signal::ABORT) || said.contains("allocate memory") {
        return CompileError::Limit(format!(
            "compiling with at most {} bytes of memory",
            limits.memory_bytes_max
        ));
    }
    if status.code() == Some(EXIT_BROKEN) {
        return CompileError::Broken(said);
    }
    CompileError::Process(format!("the compiler's process ended with {status}: {said}"))
}

/// Why a compiling process has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CompileProcessError {
    /// It must not go on.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The runtime does not start.
    #[error(transparent)]
    Runtime(#[from] PluginError),
    /// Its socket.
    #[error("read a component, write its code: {0}")]
    Io(#[from] io::Error),
}

/// The other side, `galerne compile-guest`: confines itself, reads a component from standard input until its end, writes the
/// compiled code, which counts fuel or does not, to standard output. A component that is none ends this process with its reason on standard error.
///
/// # Errors
/// Anything that is not the component's fault.
pub fn compile_guest(cpu: Duration, memory_bytes: u64, count_fuel: bool) -> Result<(), CompileProcessError> {
    sandbox::confine(Bounds {
        cpu_s: Some(cpu.as_secs()),
        memory_bytes,
    })?;
    let mut component = Vec::new();
    io::stdin().lock().read_to_end(&mut component)?;
    let engine = runtime::compiling_engine(&GuestLimits::default(), count_fuel)?;
    match engine.precompile_component(&component) {
        Ok(artifact) => {
            let mut out = io::stdout().lock();
            out.write_all(&artifact)?;
            Ok(out.flush()?)
        }
        Err(error) => {
            io::stderr().write_all(reasons(&error).as_bytes())?;
            std::process::exit(EXIT_BROKEN)
        }
    }
}
