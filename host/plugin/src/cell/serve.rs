//! A cell's own side: takes orders from the host, runs guests with a plugin host of this process, answers. Knows no wire
//! beyond its frames and no tenant.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use galerne_core::capability::Grants;
use galerne_core::guest::{
    Answer as Taken, Architecture, ChatFormat, ChatParser, FilterSession, GuestError, SamplerSession,
    SequenceInfo, ToolFactory as _, World,
};
use galerne_core::limits::Allowance;

use super::frames::{Came, Frames, messages};
use super::outbox::{Outbox, WhenFull};
use super::protocol::{
    BLOCKING_THREADS, Call, CallId, Failure, GuestId, Order, PIPELINE_THREADS, Reply, Said, SessionId,
    Settings,
};
use super::remote::Remote;
use crate::filter::FilterGuest;
use crate::host::{PluginHost, PluginOptions};
use crate::pipeline::PipelineGuest;
use crate::sampler::{self, Grammars, SamplerGuest};
use crate::sandbox::{self, Bounds, SandboxError};
use crate::tool::ToolGuest;
use crate::workers::{GUEST_STACK_BYTES, Nature, Workers};

/// Calls that may wait for one.
const BLOCKING_CALLS_MAX: usize = 4_096;
/// The host may send compiled code of any size it made itself.
const FRAME_BYTES_MAX: usize = u32::MAX as usize;

/// Why a cell ends before its host wants it to.
#[derive(Debug, thiserror::Error)]
pub enum CellError {
    /// It must not go on.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Its socket.
    #[error("talk to the host: {0}")]
    Io(#[from] io::Error),
    /// The host says what no host says.
    #[error("talk to the host: {0}")]
    Protocol(String),
}

/// `galerne cell`: confines this process, then runs guests as the host on standard input orders, until the host is gone.
/// Standard input is one end of a socket pair.
///
/// # Errors
/// See [`CellError`].
pub fn cell(memory_bytes: u64) -> Result<(), CellError> {
    sandbox::confine(Bounds {
        cpu_s: None,
        memory_bytes,
    })?;
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let out = Arc::new(Outbox::new(socket.try_clone()?));
    let mut socket = BufReader::new(socket);
    let mut frames = Frames::new(FRAME_BYTES_MAX);
    let mut cell = None;
    loop {
        match frames.read(&mut socket)? {
            Came::Frame(frame) => {
                messages(&frame, |order| take(&mut cell, &out, order)).map_err(CellError::Protocol)?;
                if let Some(cell) = &cell {
                    cell.help();
                }
            }
            Came::Part => {}
            // The host is gone: nobody waits for anything that still runs.
            Came::End => std::process::exit(0),
        }
    }
}

/// Carries out an order, or lets another thread do it.
fn take(cell: &mut Option<Arc<Cell>>, out: &Arc<Outbox>, order: Order) -> Result<(), String> {
    match (order, cell.as_ref()) {
        (Order::Call(id, Call::Start(settings)), None) => {
            let started = Cell::new(&settings, Arc::clone(out));
            let result = match started {
                Ok(started) => {
                    *cell = Some(Arc::new(started));
                    Ok(Reply::Done)
                }
                Err(error) => Err(Failure::Cell(error)),
            };
            answer(out, id, result);
            Ok(())
        }
        (order, Some(cell)) => {
            cell.take(order);
            Ok(())
        }
        (_, None) => Err("an order before the start".to_owned()),
    }
}

fn answer(out: &Outbox, id: CallId, result: Result<Reply, Failure>) {
    // An outbox is closed when the host is gone; then nobody waits.
    let _ = out.push_now(&Said::Answer(id, result), WhenFull::Wait);
}

/// A loaded guest.
#[derive(Clone)]
enum Guest {
    Model(Arc<dyn Architecture>),
    Chat(Arc<dyn ChatFormat>),
    Sampler(SamplerGuest),
    Filter(Arc<FilterGuest>),
    Tool(ToolGuest),
    Pipeline(PipelineGuest),
}

/// Something of a guest that lives for one request.
#[derive(Clone)]
enum Session {
    Sampler(Arc<SamplerSlot>),
    Filter(Arc<Mutex<Box<dyn FilterSession>>>),
    Parser(Arc<Mutex<Box<dyn ChatParser>>>),
}

struct Cell {
    host: PluginHost,
    out: Arc<Outbox>,
    remote: Arc<Remote>,
    blocking: Workers,
    pipelines: Workers,
    // std Mutexes: held for look-ups, never while a guest runs.
    guests: Mutex<HashMap<GuestId, Guest>>,
    sessions: Mutex<HashMap<SessionId, Session>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cell {
    fn new(settings: &Settings, out: Arc<Outbox>) -> Result<Self, String> {
        let host = PluginHost::in_cell(PluginOptions {
            limits: settings.limits,
            workers: settings.workers,
            instances_max: settings.instances_max,
            candidates_max: settings.candidates_max,
            ..PluginOptions::default()
        })
        .map_err(|error| error.to_string())?;
        let [blocking, pipelines] = [BLOCKING_THREADS, PIPELINE_THREADS]
            .map(|threads| host.more_workers(threads, BLOCKING_CALLS_MAX, GUEST_STACK_BYTES));
        Ok(Self {
            host,
            remote: Arc::new(Remote::new(Arc::clone(&out))),
            out,
            blocking,
            pipelines,
            guests: Mutex::default(),
            sessions: Mutex::default(),
        })
    }

    fn take(self: &Arc<Self>, order: Order) {
        match order {
            Order::Close(session) => {
                let session = lock(&self.sessions).remove(&session);
                if let Some(Session::Sampler(slot)) = session {
                    slot.close(&self.out);
                }
            }
            Order::Reply(id, result) => self.remote.answered(id, result),
            Order::Unload(guest) => drop(lock(&self.guests).remove(&guest)),
            // Samplers' questions do not block; they are answered on the plugin host's own threads.
            Order::Call(id, Call::Plan(session, step)) => {
                self.ask(id, session, Asked::Plan, |session| session.request_plan(step));
            }
            Order::Call(id, Call::Choose(session, candidates)) => {
                self.ask(id, session, Asked::Choice, |session| {
                    session.request_choice(candidates);
                });
            }
            Order::Call(id, call) => {
                let workers = match call {
                    Call::Pipeline { .. } => &self.pipelines,
                    _ => &self.blocking,
                };
                let cell = Arc::clone(self);
                let job = Box::new(move || answer(&cell.out, id, cell.run(call)));
                if workers.push(Nature::Any, job).is_err() {
                    answer(
                        &self.out,
                        id,
                        Err(Failure::Cell("too many calls wait".to_owned())),
                    );
                }
            }
        }
    }

    fn ask(&self, id: CallId, session: SessionId, asked: Asked, ask: impl FnOnce(&mut dyn SamplerSession)) {
        let session = lock(&self.sessions).get(&session).cloned();
        match session {
            Some(Session::Sampler(slot)) => slot.ask(&self.out, id, asked, ask),
            _ => answer(&self.out, id, Err(unknown("session"))),
        }
    }

    /// Answers samplers' questions on this thread until none waits: most are answered before another thread wakes up, and
    /// their answers are one frame.
    fn help(&self) {
        self.out.corked(|| self.host.help());
    }

    /// On a thread of its own: a call that blocks.
    fn run(&self, call: Call) -> Result<Reply, Failure> {
        match call {
            Call::Load {
                guest,
                world,
                name,
                grants,
                allowance,
                artifact,
            } => {
                let loaded = self.load(world, &name, (&grants, &allowance), &artifact)?;
                lock(&self.guests).insert(guest, loaded);
                Ok(Reply::Done)
            }
            Call::Facts { name, artifact } => {
                let facts = self.host.facts(&name, &artifact)?;
                Ok(Reply::Facts(facts.worlds, facts.imports))
            }
            Call::ModelTypes(guest) => Ok(Reply::Types(self.model(guest)?.model_types()?)),
            Call::Build(guest, config_json) => Ok(Reply::Graph(self.model(guest)?.build(&config_json)?)),
            Call::Recognises {
                guest,
                template,
                special_tokens,
            } => Ok(Reply::Recognised(
                self.chat(guest)?
                    .recognises(template.as_deref(), &special_tokens)?,
            )),
            Call::Render {
                guest,
                messages,
                tools,
                options,
            } => Ok(Reply::Segments(
                self.chat(guest)?.render(&messages, &tools, &options)?,
            )),
            Call::Parser(guest, session, options) => {
                let parser = self.chat(guest)?.parser(&options)?;
                self.open(session, Session::Parser(Arc::new(Mutex::new(parser))))
            }
            Call::Push(session, text) => Ok(Reply::Deltas(lock(&*self.parser(session)?).push(&text)?)),
            Call::ParserFinish(session) => Ok(Reply::Deltas(lock(&*self.parser(session)?).finish()?)),
            Call::Sampler {
                guest,
                session,
                params_json,
                vocabulary,
                seed,
                prompt,
                constrained,
            } => {
                let info = SequenceInfo {
                    prompt: &prompt,
                    constrained,
                    ..SequenceInfo::new(&params_json, vocabulary, seed)
                };
                self.sampler(guest, session, &info)
            }
            Call::Filter {
                guest,
                session,
                params_json,
                info,
            } => {
                let Some(Guest::Filter(guest)) = self.guest(guest) else {
                    return Err(unknown("filter"));
                };
                let filter = guest.open(&params_json, &info, Some(self.remote.session(session)))?;
                self.open(session, Session::Filter(Arc::new(Mutex::new(filter))))
            }
            Call::OnRequest(session, request) => Ok(Reply::Verdict(
                lock(&*self.filter(session)?).on_request(&request)?,
            )),
            Call::OnText(session, channel, text) => Ok(Reply::Text(
                lock(&*self.filter(session)?).on_text(channel, &text)?,
            )),
            Call::Finish(session, channel) => Ok(Reply::Text(lock(&*self.filter(session)?).finish(channel)?)),
            Call::ToolList(guest, params_json) => Ok(Reply::Tools(self.tool(guest)?.list(&params_json)?)),
            Call::Tool {
                guest,
                session,
                params_json,
                info,
                name,
                arguments_json,
            } => {
                let remote = Some(self.remote.session(session));
                let mut calls = self.tool(guest)?.open(&params_json, &info, remote);
                Ok(Reply::Text(calls.call(&name, &arguments_json)?))
            }
            Call::Pipeline {
                guest,
                session,
                params_json,
                info,
                request,
            } => {
                let Some(Guest::Pipeline(guest)) = self.guest(guest) else {
                    return Err(unknown("pipeline"));
                };
                let remote = self.remote.session(session);
                Ok(Reply::Finish(guest.answer(
                    &params_json,
                    &info,
                    request,
                    remote,
                )?))
            }
            Call::Start(_) | Call::Plan(..) | Call::Choose(..) => Err(unknown("order")),
        }
    }

    fn load(
        &self,
        world: World,
        name: &str,
        (grants, allowance): (&Grants, &Allowance),
        artifact: &[u8],
    ) -> Result<Guest, GuestError> {
        let granted = || self.host.load_granted(name, world, artifact, grants, allowance);
        Ok(match world {
            World::Model => Guest::Model(self.host.load_model(name, artifact)?),
            World::Chat => Guest::Chat(self.host.load_chat(name, artifact)?),
            World::Sampler => {
                let (core, pre) = granted()?;
                Guest::Sampler(SamplerGuest::new(core, pre)?)
            }
            World::Filter => {
                let (core, pre) = granted()?;
                Guest::Filter(Arc::new(FilterGuest::new(core, pre)?))
            }
            World::Tool => {
                let (core, pre) = granted()?;
                Guest::Tool(ToolGuest::new(core, pre)?)
            }
            World::Pipeline => {
                let (core, pre) = granted()?;
                Guest::Pipeline(PipelineGuest::new(core, pre)?)
            }
        })
    }

    fn sampler(&self, guest: GuestId, session: SessionId, info: &SequenceInfo<'_>) -> Result<Reply, Failure> {
        let Some(Guest::Sampler(guest)) = self.guest(guest) else {
            return Err(unknown("sampler"));
        };
        let slot = Arc::new(SamplerSlot::default());
        let (ready, out) = (Arc::downgrade(&slot), Arc::clone(&self.out));
        let waker = Arc::new(move || {
            if let Some(slot) = Weak::upgrade(&ready) {
                slot.answer_if_ready(&out);
            }
        });
        let grammars = Grammars::Host(self.remote.session(session));
        let live = guest.open(info, grammars, waker)?;
        lock(&slot.state).session = Some(live);
        self.open(session, Session::Sampler(slot))
    }

    fn open(&self, id: SessionId, session: Session) -> Result<Reply, Failure> {
        lock(&self.sessions).insert(id, session);
        Ok(Reply::Done)
    }

    fn guest(&self, id: GuestId) -> Option<Guest> {
        lock(&self.guests).get(&id).cloned()
    }

    fn model(&self, id: GuestId) -> Result<Arc<dyn Architecture>, Failure> {
        match self.guest(id) {
            Some(Guest::Model(guest)) => Ok(guest),
            _ => Err(unknown("architecture")),
        }
    }

    fn chat(&self, id: GuestId) -> Result<Arc<dyn ChatFormat>, Failure> {
        match self.guest(id) {
            Some(Guest::Chat(guest)) => Ok(guest),
            _ => Err(unknown("chat format")),
        }
    }

    fn tool(&self, id: GuestId) -> Result<ToolGuest, Failure> {
        match self.guest(id) {
            Some(Guest::Tool(guest)) => Ok(guest),
            _ => Err(unknown("tool")),
        }
    }

    fn parser(&self, id: SessionId) -> Result<Arc<Mutex<Box<dyn ChatParser>>>, Failure> {
        match lock(&self.sessions).get(&id) {
            Some(Session::Parser(parser)) => Ok(Arc::clone(parser)),
            _ => Err(unknown("parser")),
        }
    }

    fn filter(&self, id: SessionId) -> Result<Arc<Mutex<Box<dyn FilterSession>>>, Failure> {
        match lock(&self.sessions).get(&id) {
            Some(Session::Filter(filter)) => Ok(Arc::clone(filter)),
            _ => Err(unknown("filter session")),
        }
    }
}

/// The host spoke of something this cell does not have: a bug of the host's side.
fn unknown(what: &str) -> Failure {
    Failure::Cell(format!("an order for a {what} that is not here"))
}

/// What was asked of a sampler.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Plan,
    Choice,
}

/// A sampler's session and its open question.
#[derive(Default)]
struct SamplerSlot {
    // A std Mutex: a session's calls do not block.
    state: Mutex<SamplerState>,
}

#[derive(Default)]
struct SamplerState {
    session: Option<sampler::Session>,
    open: Option<(CallId, Asked)>,
}

impl SamplerSlot {
    fn ask(&self, out: &Outbox, id: CallId, asked: Asked, ask: impl FnOnce(&mut dyn SamplerSession)) {
        let mut state = lock(&self.state);
        let Some(session) = &mut state.session else {
            drop(state);
            answer(out, id, Err(unknown("open session")));
            return;
        };
        ask(session);
        state.open = Some((id, asked));
        drop(state);
        // A session that has failed answers at once and wakes nobody.
        self.answer_if_ready(out);
    }

    /// On any thread. Whoever comes first sends the answer.
    fn answer_if_ready(&self, out: &Outbox) {
        let mut state = lock(&self.state);
        let (Some((id, asked)), Some(session)) = (state.open, &mut state.session) else {
            return;
        };
        let ready = match asked {
            Asked::Plan => match session.take_guest_plan() {
                Taken::Pending => return,
                Taken::Ready(plan) => plan.map(Reply::Plan),
            },
            Asked::Choice => match session.take_choice() {
                Taken::Pending => return,
                // Bounded by the number of candidates, which a u32 counts.
                Taken::Ready(index) => {
                    index.map(|index| Reply::Choice(u32::try_from(index).unwrap_or(u32::MAX)))
                }
            },
        };
        state.open = None;
        drop(state);
        answer(out, id, ready.map_err(Failure::Guest));
    }

    fn close(&self, out: &Outbox) {
        let mut state = lock(&self.state);
        let (session, open) = (state.session.take(), state.open.take());
        drop(state);
        drop(session);
        if let Some((id, _)) = open {
            answer(out, id, Err(Failure::Cell("its session was closed".to_owned())));
        }
    }
}
