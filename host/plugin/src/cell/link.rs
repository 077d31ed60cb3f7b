//! The host's side of a cell: its process, the calls that wait for it, its end and its next start. Knows no world.

use std::collections::{HashMap, HashSet};
use std::io::{self, BufReader, Read as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use galerne_core::capability::CapabilityError;
use galerne_core::limits::CellLimits;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde_bytes::ByteBuf;

use super::frames::{Came, Frames, HEADER_BYTES, first_frame, messages};
use super::outbox::{Outbox, Patience, Refused, WhenFull};
use super::protocol::{Call, CallId, Failure, GuestId, Order, Question, Reply, Said, SessionId, Settings};
use super::questions::Questions;
use crate::errors::bounded;

/// The sub-command of the worker's program.
const COMMAND: &str = "cell";
/// How often silence is noticed.
const WATCH: Duration = Duration::from_millis(100);
/// How long the engine's thread may wait for a cell that does not read, once in the cell's life.
const HASTE: Duration = Duration::from_millis(1);
/// A start that takes longer has failed.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// No call is waited for longer than this past its deadline and what it may wait for the host, even if the cell goes on
/// answering others.
const PATIENCE_MAX: Duration = Duration::from_secs(60);
/// Readings between two looks at the clock.
const READINGS_MAX: usize = 64;
/// A longer frame is not for whoever watches for answers: the plans of a step have some tens of bytes each.
const SHORT_BYTES: usize = 8 << 10;
/// Bytes of a dead cell's last words that are read.
const WORDS_BYTES_MAX: u64 = 4 << 10;

/// What becomes of a call. `Err(Failure::Cell)` if the cell is gone.
pub(super) type Sink = Box<dyn FnOnce(Result<Reply, Failure>) + Send>;

/// A tenant's cell: at most one process at a time.
pub(crate) struct Cell {
    tenant: String,
    program: PathBuf,
    limits: CellLimits,
    settings: Settings,
    guests: AtomicU32,
    /// Guests that are still needed.
    needed: AtomicU32,
    /// Processes so far.
    started: AtomicU64,
    // A std Mutex: held while a process is started, so that one is.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    connection: Option<Arc<Connection>>,
    /// Failures one after the other.
    failures: u32,
    /// Not started before.
    retry_at: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cell {
    pub(crate) fn new(tenant: &str, program: PathBuf, limits: CellLimits, settings: Settings) -> Self {
        Self {
            tenant: tenant.to_owned(),
            program,
            limits,
            settings,
            guests: AtomicU32::new(0),
            needed: AtomicU32::new(0),
            started: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    /// Processes that were started.
    pub(crate) fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// Whether a process runs, or is being started.
    pub(crate) fn is_running(&self) -> bool {
        let Ok(state) = self.state.try_lock() else {
            return true;
        };
        let connection = state.connection.as_ref();
        connection.is_some_and(|connection| connection.gone().is_none())
    }

    /// A number for a guest, for all processes of this cell. Ask for it before [`connection`](Self::connection): the
    /// process goes when no guest is left, see [`forget`](Self::forget).
    pub(super) fn next_guest(&self) -> GuestId {
        self.needed.fetch_add(1, Ordering::SeqCst);
        GuestId(self.guests.fetch_add(1, Ordering::Relaxed))
    }

    /// The running process; starts one if there is none. After a failure it waits before the next start, or refuses if
    /// that would take longer than `patience`.
    pub(super) fn connection(&self, patience: Duration) -> Result<Arc<Connection>, String> {
        let mut state = lock(&self.state);
        if let Some(connection) = &state.connection {
            let Some((reason, at)) = connection.gone() else {
                return Ok(Arc::clone(connection));
            };
            tracing::warn!(tenant = %self.tenant, reason, "a cell is gone");
            let lived = at.duration_since(connection.started);
            state.connection = None;
            self.failed(&mut state, at, lived);
        }
        if let Some(wait) = state
            .retry_at
            .map(|at| at.saturating_duration_since(Instant::now()))
        {
            if wait > patience {
                return Err(format!(
                    "its cell failed and is started again in {} ms",
                    wait.as_millis()
                ));
            }
            std::thread::sleep(wait);
        }
        self.started.fetch_add(1, Ordering::Relaxed);
        match Connection::start(self) {
            Ok(connection) => {
                state.connection = Some(Arc::clone(&connection));
                Ok(connection)
            }
            Err(reason) => {
                tracing::warn!(tenant = %self.tenant, reason, "a cell does not start");
                self.failed(&mut state, Instant::now(), Duration::ZERO);
                Err(reason)
            }
        }
    }

    /// The guest is no longer needed. With the last one goes the process: a tenant without guests costs nothing.
    pub(super) fn forget(&self, guest: GuestId) {
        self.needed.fetch_sub(1, Ordering::SeqCst);
        let mut state = lock(&self.state);
        // Counted again under the lock: somebody may have come for the next guest meanwhile.
        if self.needed.load(Ordering::SeqCst) > 0 {
            if let Some(connection) = &state.connection {
                connection.tell(&Order::Unload(guest));
            }
        } else if let Some(connection) = state.connection.take_if(|connection| connection.gone().is_none()) {
            connection.end("its last guest is gone");
        }
    }

    /// Sets when to try again: twice as late as the last time, unless the process lived long.
    fn failed(&self, state: &mut State, at: Instant, lived: Duration) {
        if lived > self.limits.restart_max {
            state.failures = 0;
        }
        let wait = self.limits.restart_min * 2u32.saturating_pow(state.failures.min(20));
        state.failures += 1;
        state.retry_at = Some(at + wait.min(self.limits.restart_max));
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if let Some(connection) = &lock(&self.state).connection {
            connection.end("its host has stopped");
        }
    }
}

/// A call on its way.
struct Pending {
    since: Instant,
    deadline: Duration,
    sink: Sink,
}

/// What has come of a cell and is not yet heard.
struct Ear {
    frames: Frames,
    socket: BufReader<Coming>,
    /// Room for a short frame.
    short: Box<[u8; SHORT_BYTES]>,
}

/// A socket that is read without waiting.
struct Coming(UnixStream);

impl io::Read for Coming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (read, _) = recv(&self.0, buffer, RecvFlags::DONTWAIT)?;
        Ok(read)
    }
}

/// One process of a cell.
pub(super) struct Connection {
    out: Outbox,
    socket: UnixStream,
    // A std Mutex: held to hear what has come, never while waiting for more.
    ear: Mutex<Ear>,
    started: Instant,
    /// What its guests ask.
    pub(super) questions: Questions,
    patience_max: Duration,
    next: AtomicU64,
    // std Mutexes: held for look-ups and changes only.
    calls: Mutex<Calls>,
    loaded: Mutex<HashSet<GuestId>>,
}

#[derive(Default)]
struct Calls {
    pending: HashMap<CallId, Pending>,
    last_answer: Option<Instant>,
    gone: Option<(String, Instant)>,
}

impl Connection {
    /// Starts a process and the two threads that talk to it.
    fn start(cell: &Cell) -> Result<Arc<Self>, String> {
        let failed = |what: &str, error: io::Error| format!("{what}: {error}");
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed("make a socket", error))?;
        // Only writing by the engine's thread has to be quick, and that alone heeds this.
        let to_cell = ours
            .set_write_timeout(Some(HASTE))
            .and_then(|()| ours.try_clone());
        let to_cell = to_cell.map_err(|error| failed("set up a socket", error))?;
        let from_cell = ours.try_clone();
        let from_cell = from_cell.map_err(|error| failed("set up a socket", error))?;
        let wait_max = cell.settings.limits.wait_max;
        let connection = Arc::new(Self {
            out: Outbox::new(to_cell),
            socket: ours,
            ear: Mutex::new(Ear {
                frames: Frames::new(cell.limits.message_bytes_max.saturating_mul(2)),
                socket: BufReader::new(Coming(from_cell)),
                short: Box::new([0; SHORT_BYTES]),
            }),
            started: Instant::now(),
            questions: Questions::new(wait_max.max(cell.settings.limits.pipeline_wait_max)),
            patience_max: PATIENCE_MAX.saturating_add(wait_max),
            next: AtomicU64::new(0),
            calls: Mutex::default(),
            loaded: Mutex::default(),
        });
        let thread = |what: &str| std::thread::Builder::new().name(format!("cell-{what}"));
        let sender = Arc::clone(&connection);
        thread("send")
            .spawn(move || sender.out.send())
            .map_err(|error| failed("start a thread", error))?;
        let (started, is_started) = mpsc::sync_channel(1);
        let (reader, program, limits) = (Arc::clone(&connection), cell.program.clone(), cell.limits);
        // The process ends with the thread that started it, so that thread stays with it.
        let spawned = thread("read").spawn(move || match spawn(&program, &limits, theirs) {
            Ok(child) => {
                let _ = started.send(Ok(()));
                reader.read(child, &limits);
            }
            Err(error) => {
                let _ = started.send(Err(format!("start {} {COMMAND}: {error}", program.display())));
            }
        });
        spawned.map_err(|error| failed("start a thread", error))?;
        let begun = is_started
            .recv()
            .unwrap_or_else(|_| Err("its thread ended".to_owned()));
        let ready = begun.and_then(|()| {
            let start = Call::Start(cell.settings.clone());
            match connection.call(start, START_DEADLINE) {
                Ok(Reply::Done) => Ok(()),
                Err(Failure::Cell(reason)) => Err(reason),
                other => Err(format!("it answers its start with {other:?}")),
            }
        });
        if let Err(reason) = &ready {
            connection.end(reason);
        }
        ready.map(|()| connection)
    }

    /// Why and since when the process is gone, if it is.
    fn gone(&self) -> Option<(String, Instant)> {
        lock(&self.calls).gone.clone()
    }

    /// Ends the process. All calls that wait are told why.
    pub(super) fn end(&self, reason: &str) {
        let mut calls = lock(&self.calls);
        let gone = calls
            .gone
            .get_or_insert_with(|| (bounded(reason), Instant::now()));
        let reason = gone.0.clone();
        let pending = std::mem::take(&mut calls.pending);
        drop(calls);
        self.out.close();
        // The thread that reads sees the end and takes care of the process.
        let _ = self.socket.shutdown(Shutdown::Both);
        for call in pending.into_values() {
            (call.sink)(Err(Failure::Cell(reason.clone())));
        }
    }

    /// A number for a session.
    pub(super) fn next_session(&self) -> SessionId {
        SessionId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends a call; `sink` gets its answer, on another thread or, if there is no room or no cell, on this one. One that
    /// must not wait, [`WhenFull::Refuse`], goes out with [`flush`](Self::flush).
    pub(super) fn send(&self, call: Call, deadline: Duration, when_full: WhenFull, sink: Sink) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut calls = lock(&self.calls);
        if let Some((reason, _)) = calls.gone.clone() {
            drop(calls);
            return sink(Err(Failure::Cell(reason)));
        }
        let pending = Pending {
            since: Instant::now(),
            deadline,
            sink,
        };
        calls.pending.insert(id, pending);
        drop(calls);
        let order = Order::Call(id, call);
        let pushed = match when_full {
            WhenFull::Refuse => self.out.push(&order, when_full),
            WhenFull::Wait | WhenFull::Take => self.out.push_now(&order, when_full),
        };
        let Err(refused) = pushed else {
            return;
        };
        // Who ends a connection takes its calls first; one that is left is this one's to answer.
        let left = lock(&self.calls).pending.remove(&id);
        if let Some(left) = left {
            (left.sink)(Err(Failure::Cell(match refused {
                Refused::Full => "too many questions wait for its cell".to_owned(),
                Refused::Closed => "its cell ended".to_owned(),
            })));
        }
    }

    /// Sends a call and waits for its answer.
    pub(super) fn call(&self, call: Call, deadline: Duration) -> Result<Reply, Failure> {
        let (answered, answer) = mpsc::sync_channel(1);
        let sink = Box::new(move |result| {
            // The receiver waits below.
            let _ = answered.send(result);
        });
        self.send(call, deadline, WhenFull::Wait, sink);
        answer
            .recv()
            .unwrap_or_else(|_| Err(Failure::Cell("its cell ended".to_owned())))
    }

    /// Sends what has no answer. Sessions end on the engine's thread too, which must not wait for a cell that does not read.
    pub(super) fn tell(&self, order: &Order) {
        // A cell that is gone has forgotten it already.
        let _ = self.out.push(order, WhenFull::Take);
        self.flush();
    }

    /// Sends all that waits, in one frame, and waits for nobody.
    pub(super) fn flush(&self) {
        self.out.flush(Patience::Hasty);
    }

    /// Makes sure that this process has the guest.
    pub(super) fn load(
        &self,
        guest: GuestId,
        deadline: Duration,
        call: impl FnOnce() -> Call,
    ) -> Result<(), Failure> {
        // Two threads may both load it: the second replaces the first, which changes nothing.
        if lock(&self.loaded).contains(&guest) {
            return Ok(());
        }
        match self.call(call(), deadline)? {
            Reply::Done => {
                lock(&self.loaded).insert(guest);
                Ok(())
            }
            other => Err(self.nonsense(&other)),
        }
    }

    /// An answer of another kind than the call's: the cell is not to be trusted any further.
    pub(super) fn nonsense(&self, reply: &Reply) -> Failure {
        let reason = format!("its cell broke the protocol: {}", bounded(&format!("{reply:?}")));
        self.end(&reason);
        Failure::Cell(reason)
    }

    /// On its own thread: answers calls until the process is gone, then takes it off the system's list.
    fn read(self: &Arc<Self>, mut child: Child, limits: &CellLimits) {
        let mut watched = Instant::now();
        let reason = loop {
            match self.hear() {
                Ok(Heard::All) => {
                    if let Err(error) = wait_for_more(&self.socket) {
                        break format!("its cell's socket: {error}");
                    }
                }
                Ok(Heard::Some) => {}
                Ok(Heard::End) => break String::new(),
                Err(reason) => break reason,
            }
            if watched.elapsed() >= WATCH {
                watched = Instant::now();
                if let Some(reason) = self.overdue(limits.slack) {
                    break reason;
                }
            }
        };
        let reason = last_words(&mut child, reason);
        self.end(&reason);
    }

    /// Hears what has come, but not for ever: somebody has to look at the clock.
    fn hear(self: &Arc<Self>) -> Result<Heard, String> {
        let mut ear = lock(&self.ear);
        let Ear { frames, socket, .. } = &mut *ear;
        for _ in 0..READINGS_MAX {
            match frames.read(socket) {
                Ok(Came::Frame(frame)) => {
                    let heard = messages(&frame, |said| self.heard(said));
                    heard.map_err(|reason| format!("its cell broke the protocol: {reason}"))?;
                }
                Ok(Came::Part) => {}
                Ok(Came::End) => return Ok(Heard::End),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Heard::All),
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Ok(Heard::End),
                    _ => return Err(format!("its cell's socket: {error}")),
                },
            }
        }
        Ok(Heard::Some)
    }

    /// Hears a short frame of answers, if one has come. Whatever else there is is left to the thread that reads: whoever watches for
    /// answers has little time, and a cell must not take it.
    pub(super) fn hear_answers(self: &Arc<Self>) {
        let Ok(mut ear) = self.ear.try_lock() else {
            return;
        };
        if !(ear.frames.is_between() && ear.socket.buffer().is_empty()) {
            return;
        }
        let bytes = &mut *ear.short;
        let Ok((came, _)) = recv(&self.socket, &mut *bytes, RecvFlags::DONTWAIT | RecvFlags::PEEK) else {
            return;
        };
        let Some(frame) = first_frame(&bytes[..came.min(SHORT_BYTES)]) else {
            return;
        };
        let mut answers = Vec::new();
        let understood = messages(frame, |said| match said {
            Said::Answer(id, result) => {
                answers.push((id, result));
                Ok(())
            }
            Said::Ask(_) => Err(String::new()),
        });
        if understood.is_err() {
            return;
        }
        let length = HEADER_BYTES + frame.len();
        // What was seen is there, and nobody else hears.
        let taken = recv(&self.socket, &mut bytes[..length], RecvFlags::DONTWAIT);
        debug_assert!(matches!(taken, Ok((taken, _)) if taken == length));
        drop(ear);
        for (id, result) in answers {
            if let Err(reason) = self.answered(id, result) {
                return self.end(&format!("its cell broke the protocol: {reason}"));
            }
        }
    }

    fn heard(self: &Arc<Self>, said: Said) -> Result<(), String> {
        match said {
            Said::Answer(id, result) => self.answered(id, result),
            Said::Ask(question) => self.asked(question),
        }
    }

    /// A question of a guest, answered on a thread of its own: it may take long, and nobody else is to wait for it.
    fn asked(self: &Arc<Self>, question: Question) -> Result<(), String> {
        self.questions.opened()?;
        let (connection, id) = (Arc::clone(self), question.id);
        let answer = move || {
            let result = connection.questions.answer(question);
            // While a cell does not read, its questions stay open, and there can be only so many.
            connection.out.wait_for_room();
            connection.questions.closed();
            connection.tell(&Order::Reply(id, result));
        };
        let thread = std::thread::Builder::new().name("cell-ask".to_owned());
        if let Err(error) = thread.spawn(answer) {
            self.questions.closed();
            let reason = CapabilityError::Failed(format!("start a thread: {error}"));
            self.tell(&Order::Reply(id, Err(reason)));
        }
        Ok(())
    }

    fn answered(&self, id: CallId, result: Result<Reply, Failure>) -> Result<(), String> {
        let mut calls = lock(&self.calls);
        calls.last_answer = Some(Instant::now());
        let pending = calls.pending.remove(&id);
        drop(calls);
        match pending {
            Some(pending) => (pending.sink)(result),
            None if self.gone().is_some() => {}
            None => return Err("an answer to no question".to_owned()),
        }
        Ok(())
    }

    /// Why the cell must be ended: it owes an answer and gives none, to anybody, or not this one for very long. It is not to
    /// blame while it waits for the host.
    fn overdue(&self, slack: Duration) -> Option<String> {
        let calls = lock(&self.calls);
        let silent = calls
            .last_answer
            .map_or(Duration::MAX, |answered| answered.elapsed())
            .min(self.questions.owed_before().unwrap_or(Duration::MAX));
        calls.pending.values().find_map(|call| {
            let (waited, limit) = (call.since.elapsed(), call.deadline + slack);
            let late = waited > limit && (silent > limit || waited > limit + self.patience_max);
            late.then(|| {
                format!(
                    "its cell did not answer within {} ms and was ended",
                    limit.as_millis()
                )
            })
        })
    }
}

/// How far a hearing came.
enum Heard {
    /// There may be more.
    Some,
    /// All that has come.
    All,
    /// The cell is gone.
    End,
}

/// Waits until there is something to hear, or it is time to look at the clock.
fn wait_for_more(socket: &UnixStream) -> io::Result<()> {
    let timeout = Timespec::try_from(WATCH).ok();
    let mut wanted = [PollFd::new(socket, PollFlags::IN)];
    match poll(&mut wanted, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn spawn(program: &PathBuf, limits: &CellLimits, socket: UnixStream) -> io::Result<Child> {
    Command::new(program)
        .arg(COMMAND)
        .arg(limits.memory_bytes_max.to_string())
        .env_clear()
        // A terminal's Ctrl-C is for the host, which lets running answers finish.
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
}

/// Ends the process and says how it went: `reason`, or what its status and standard error tell.
fn last_words(child: &mut Child, reason: String) -> String {
    if reason.is_empty() {
        // Its socket is closed: it is about to end by itself, and its status says why.
        let until = Instant::now() + WATCH;
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // It fails if the process has ended, which is what is wanted.
    let _ = child.kill();
    let status = child.wait();
    if !reason.is_empty() {
        return reason;
    }
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What cannot be read says nothing.
        let _ = stderr.take(WORDS_BYTES_MAX).read_to_end(&mut said);
    }
    let said = String::from_utf8_lossy(&said);
    let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    format!("its cell ended ({how}) {}", said.trim())
        .trim_end()
        .to_owned()
}

/// Compiled code as it goes over the wire.
pub(super) fn code(artifact: &crate::artifact::Artifact) -> ByteBuf {
    ByteBuf::from(artifact.bytes().to_vec())
}
