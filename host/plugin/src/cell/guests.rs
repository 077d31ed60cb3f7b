//! A guest loaded in a cell, whatever its world, and its sessions. Gives a cell's errors the names this host knows. Knows no
//! world's calls.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use galerne_core::chat::ChatError;
use galerne_core::filter::{FilterError, RequestInfo};
use galerne_core::guest::{GuestError, GuestFacts, World};
use galerne_core::pipeline::PipelineError;
use galerne_core::tool::ToolError;

use super::link::{Cell, Connection, code};
use super::protocol::{Call, Failure, GuestId, Order, Reply, SessionId};
use super::questions::Answerer;
use crate::artifact::Artifact;
use crate::errors::{bounded, deadline_name};
use crate::instance::GuestCore;

/// A guest loaded in a cell, of any world. It outlives the cell's processes: each is given it when it first needs it.
pub(crate) struct CellGuest {
    pub(super) core: GuestCore,
    pub(super) id: GuestId,
    cell: Arc<Cell>,
    world: World,
    artifact: Artifact,
}

impl CellGuest {
    /// Loads it once, so that one that does not fit is refused now.
    pub(crate) fn load(
        core: GuestCore,
        cell: Arc<Cell>,
        world: World,
        artifact: Artifact,
    ) -> Result<Arc<Self>, GuestError> {
        let guest = Self {
            id: cell.next_guest(),
            core,
            cell,
            world,
            artifact,
        };
        guest.connection("load")?;
        Ok(Arc::new(guest))
    }

    /// A process that has the guest.
    fn connection(&self, call: &'static str) -> Result<Arc<Connection>, GuestError> {
        let patience = self.core.limits().request_deadline;
        let connection = self
            .cell
            .connection(patience)
            .map_err(|reason| self.core.process_gone(call, reason))?;
        let load = || Call::Load {
            guest: self.id,
            world: self.world,
            name: self.core.name.to_string(),
            grants: self.core.grants(),
            allowance: Box::new((*self.core.allowance).clone()),
            artifact: code(&self.artifact),
        };
        connection
            .load(self.id, self.core.limits().build_deadline, load)
            .map_err(|failure| self.failure(call, failure))?;
        Ok(connection)
    }

    /// A call that needs no session, and the process that answered it.
    pub(super) fn call(
        &self,
        name: &'static str,
        deadline: Duration,
        call: Call,
    ) -> Result<(Arc<Connection>, Reply), Failure> {
        let connection = self.connection(name)?;
        let reply = connection.call(call, deadline)?;
        Ok((connection, reply))
    }

    /// Who answers the guest's questions in one request, if it may ask any.
    pub(super) fn answerer(&self, info: &RequestInfo) -> Option<Answerer> {
        let session = self.core.capability_session(info)?;
        Some(Arc::new(Mutex::new(session)))
    }

    /// A number for a session in a process that has the guest. The session's questions go to `answerer`.
    pub(super) fn session(
        self: &Arc<Self>,
        name: &'static str,
        answerer: Option<Answerer>,
    ) -> Result<CellSession, GuestError> {
        let connection = self.connection(name)?;
        let id = connection.next_session();
        if let Some(answerer) = answerer {
            connection.questions.expect(id, answerer);
        }
        Ok(CellSession {
            guest: Arc::clone(self),
            id,
            connection,
        })
    }

    /// Opens a session with the call that `open` makes for its number. Its questions go to `answerer`.
    pub(super) fn open(
        self: &Arc<Self>,
        name: &'static str,
        answerer: Option<Answerer>,
        open: impl FnOnce(SessionId) -> Call,
    ) -> Result<CellSession, Failure> {
        let session = self.session(name, answerer)?;
        let call = open(session.id);
        match session
            .connection
            .call(call, self.core.limits().request_deadline)?
        {
            Reply::Done => Ok(session),
            other => Err(session.connection.nonsense(&other)),
        }
    }

    /// The guest's error, with the names this host knows it by.
    pub(super) fn failure(&self, call: &'static str, failure: Failure) -> GuestError {
        named_failure(&self.core, call, failure)
    }
}

impl Drop for CellGuest {
    fn drop(&mut self) {
        self.cell.forget(self.id);
    }
}

/// A session in a cell's process, which ends with that process.
pub(super) struct CellSession {
    pub(super) guest: Arc<CellGuest>,
    pub(super) connection: Arc<Connection>,
    pub(super) id: SessionId,
}

impl Drop for CellSession {
    fn drop(&mut self) {
        self.connection.questions.forget(self.id);
        self.connection.tell(&Order::Close(self.id));
    }
}

/// The worlds and imports of a component, as the cell finds them by loading it.
pub(crate) fn inspect(core: &GuestCore, cell: &Cell, artifact: &Artifact) -> Result<GuestFacts, GuestError> {
    let limits = core.limits();
    let visit = cell.next_guest();
    let connection = cell.connection(limits.request_deadline);
    let connection = connection.map_err(|reason| {
        cell.forget(visit);
        core.process_gone("load", reason)
    })?;
    let call = Call::Facts {
        name: core.name.to_string(),
        artifact: code(artifact),
    };
    let facts = match connection.call(call, limits.build_deadline) {
        Ok(Reply::Facts(worlds, imports)) if !worlds.is_empty() => Ok(GuestFacts {
            worlds,
            imports: imports.iter().map(|name| bounded(name)).collect(),
        }),
        Ok(other) => Err(connection.nonsense(&other)),
        Err(failure) => Err(failure),
    };
    cell.forget(visit);
    facts.map_err(|failure| named_failure(core, "load", failure))
}

/// The guest's error, with the names this host knows it by.
fn named_failure(core: &GuestCore, call: &'static str, failure: Failure) -> GuestError {
    match failure {
        Failure::Guest(error)
        | Failure::Filter(FilterError::Guest(error))
        | Failure::Chat(ChatError::Guest(error))
        | Failure::Tool(ToolError::Guest(error))
        | Failure::Pipeline(PipelineError::Guest(error)) => named(core, call, error),
        Failure::Cell(reason) => core.process_gone(call, bounded(&reason)),
        Failure::Filter(_) | Failure::Chat(_) | Failure::Tool(_) | Failure::Pipeline(_) => {
            let expected = "an error of this call";
            core.bad_answer(call, expected, "an error of another call")
        }
    }
}

fn named(core: &GuestCore, call: &'static str, error: GuestError) -> GuestError {
    let guest = core.name.to_string();
    match error {
        GuestError::Trap { reason, .. } => core.counted(GuestError::Trap {
            guest,
            call: call.into(),
            reason: bounded(&reason),
        }),
        GuestError::Deadline { limit_ms, .. } => core.counted(GuestError::Deadline {
            guest,
            call: call.into(),
            limit_ms,
            raise: core.allowance.who(deadline_name(call)),
        }),
        GuestError::Limit { limit, .. } => core.over_limit(call, bounded(&limit)),
        GuestError::Refused { message, .. } => core.refused(call, &message),
        GuestError::Plan { mut error, .. } => {
            error.field = bounded(&error.field).into();
            error.expected = bounded(&error.expected).into();
            error.got = bounded(&error.got);
            core.counted(GuestError::Plan { guest, error })
        }
        GuestError::Answer { expected, got, .. } => core.counted(GuestError::Answer {
            guest,
            call: call.into(),
            expected: bounded(&expected).into(),
            got: bounded(&got),
        }),
        GuestError::Link { reason, .. } => core.link_reason(bounded(&reason)),
        GuestError::Process { reason, .. } => core.process_gone(call, bounded(&reason)),
    }
}
