//! Filters in a cell, as the traits of core. The cell counts what it holds back; what it lets out is counted again here.

use std::sync::Arc;

use galerne_core::filter::{
    Channel, FilterError, FilterRequest, Refusal, RequestError, RequestInfo, Verdict,
};
use galerne_core::guest::{FilterFactory, FilterSession, GuestError};

use super::guests::{CellGuest, CellSession};
use super::protocol::{Call, Failure, Reply};
use crate::filter::{check_let_out, checked_refusal};

/// A filter in a cell.
pub(crate) struct CellFilter(pub(crate) Arc<CellGuest>);

impl FilterFactory for CellFilter {
    fn session(&self, params_json: &str, info: &RequestInfo) -> Result<Box<dyn FilterSession>, GuestError> {
        let Self(guest) = self;
        let open = |session| Call::Filter {
            guest: guest.id,
            session,
            params_json: params_json.to_owned(),
            info: info.clone(),
        };
        let session = guest
            .open("create", guest.answerer(info), open)
            .map_err(|failure| guest.failure("create", failure))?;
        Ok(Box::new(Session {
            session,
            failed: None,
            let_out_bytes: 0,
        }))
    }
}

/// The session of one request, until its first error or refusal.
struct Session {
    session: CellSession,
    failed: Option<FilterError>,
    /// The length of all that was let out.
    let_out_bytes: usize,
}

impl Session {
    /// Does `step`, unless an earlier one failed.
    fn step<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T, FilterError>) -> Result<T, FilterError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = step(self);
        self.failed = result.as_ref().err().cloned();
        result
    }

    fn error(&self, call: &'static str, failure: Failure) -> FilterError {
        let guest = &self.session.guest;
        match failure {
            Failure::Filter(FilterError::Refused(Refusal { status, reason, .. })) => {
                checked_refusal(&guest.core, call, status, &reason)
            }
            other => guest.failure(call, other).into(),
        }
    }

    fn text(&mut self, name: &'static str, call: Call) -> Result<String, FilterError> {
        let limits = *self.session.guest.core.limits();
        let connection = &self.session.connection;
        let text = match connection.call(call, limits.step_deadline) {
            Ok(Reply::Text(text)) => text,
            Ok(other) => return Err(self.error(name, connection.nonsense(&other))),
            Err(failure) => return Err(self.error(name, failure)),
        };
        self.let_out_bytes = self.let_out_bytes.saturating_add(text.len());
        check_let_out(&self.session.guest.core, name, self.let_out_bytes)?;
        Ok(text)
    }
}

impl FilterSession for Session {
    fn on_request(&mut self, request: &FilterRequest) -> Result<Verdict, FilterError> {
        self.step(|session| {
            let CellSession {
                guest,
                connection,
                id,
            } = &session.session;
            let limit = guest.core.limits().request_deadline;
            match connection.call(Call::OnRequest(*id, request.clone()), limit) {
                Ok(Reply::Verdict(Verdict::Rewrite(request))) => match request.check() {
                    Ok(()) => Ok(Verdict::Rewrite(request)),
                    Err(error) => {
                        let (expected, got) = (RequestError::EXPECTED, error.to_string());
                        Err(guest.core.bad_answer("on-request", expected, &got).into())
                    }
                },
                Ok(Reply::Verdict(verdict)) => Ok(verdict),
                Ok(other) => Err(session.error("on-request", connection.nonsense(&other))),
                Err(failure) => Err(session.error("on-request", failure)),
            }
        })
    }

    fn on_text(&mut self, channel: Channel, text: &str) -> Result<String, FilterError> {
        self.step(|session| {
            if text.is_empty() {
                return Ok(String::new());
            }
            let call = Call::OnText(session.session.id, channel, text.to_owned());
            session.text("on-text", call)
        })
    }

    fn finish(&mut self, channel: Channel) -> Result<String, FilterError> {
        self.step(|session| session.text("finish", Call::Finish(session.session.id, channel)))
    }
}
