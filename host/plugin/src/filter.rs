//! A loaded filter guest and its sessions. Holds the text a filter does not take yet. Knows nothing of tokens.

use std::collections::BTreeMap;

use galerne_core::capability::CapabilitySession;
use galerne_core::filter::{
    Channel, FilterError, FilterRequest, Refusal, RequestError, RequestInfo, Verdict,
};
use galerne_core::guest::{FilterFactory, FilterSession, GuestError};
use wasmtime::Store;
use wasmtime::component::{InstancePre, ResourceAny};

use crate::bindings::filter::exports::galerne::filter::filtering as wit;
use crate::bindings::filter::{Filter, FilterPre};
use crate::convert;
use crate::errors::bounded;
use crate::instance::GuestCore;
use crate::limiter::StoreState;

const ON_REQUEST: &str = "on-request";
const ON_TEXT: &str = "on-text";
const FINISH: &str = "finish";

/// A guest of the world `galerne:filter/filter@0.1.0`. Each session has its own instance.
pub(crate) struct FilterGuest {
    core: GuestCore,
    pre: FilterPre<StoreState>,
}

impl FilterGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let pre = FilterPre::new(pre).map_err(|error| core.link_error(&error))?;
        core.try_out(pre.instance_pre(), |store, instance| Filter::new(store, instance))?;
        Ok(Self { core, pre })
    }

    /// A session whose questions `capabilities` answers.
    pub(crate) fn open(
        &self,
        params_json: &str,
        session_info: &RequestInfo,
        capabilities: Option<Box<dyn CapabilitySession>>,
    ) -> Result<Box<dyn FilterSession>, GuestError> {
        let info = wit::RequestInfo {
            params_json: params_json.to_owned(),
            id: session_info.id.clone(),
            model: session_info.model.clone(),
        };
        let mut store = self.core.store();
        store.data_mut().asking().set_session(capabilities);
        let limit = self.core.limits().request_deadline;
        let (filter, created) = self.core.call(&mut store, "create", limit, |store| {
            let filter: Filter = self.pre.instantiate(&mut *store)?;
            let created = filter
                .galerne_filter_filtering()
                .session()
                .call_create(store, &info)?;
            Ok((filter, created))
        })?;
        let resource = created.map_err(|message| self.core.refused("create", &message))?;
        Ok(Box::new(Session {
            core: self.core.clone(),
            state: Ok(Live {
                store,
                filter,
                resource,
            }),
            flow: Flow::default(),
        }))
    }
}

impl FilterFactory for FilterGuest {
    fn session(&self, params_json: &str, info: &RequestInfo) -> Result<Box<dyn FilterSession>, GuestError> {
        self.open(params_json, info, self.core.capability_session(info))
    }
}

/// A session's own instance. Dropped without running the guest's destructor: the instance goes as a whole.
struct Live {
    store: Store<StoreState>,
    filter: Filter,
    resource: ResourceAny,
}

/// The session of one request, until its first error or refusal.
struct Session {
    core: GuestCore,
    state: Result<Live, FilterError>,
    flow: Flow,
}

/// An answer's text on its way through the filter.
#[derive(Debug, Default)]
struct Flow {
    /// What the filter did not take yet; channels without such text are not in it.
    held: BTreeMap<Channel, String>,
    /// The length of all of it.
    held_bytes: usize,
    /// The length of all that was let out.
    let_out_bytes: usize,
}

impl Flow {
    /// What the filter is to see next on this channel: what it did not take, and what came since.
    fn show(&mut self, channel: Channel, text: &str) -> String {
        let mut shown = self.held.remove(&channel).unwrap_or_default();
        self.held_bytes -= shown.len();
        shown.push_str(text);
        shown
    }

    /// Keeps what the filter did not take of `shown`, and lets out what it put in the place of the rest.
    fn pass(
        &mut self,
        core: &GuestCore,
        channel: Channel,
        mut shown: String,
        passage: wit::Passage,
    ) -> Result<String, GuestError> {
        let taken_bytes = usize::try_from(passage.taken_bytes).unwrap_or(usize::MAX);
        if !shown.is_char_boundary(taken_bytes) {
            let expected = "taken-bytes up to the length of the text, between two characters";
            let got = format!("{taken_bytes} of {} bytes", shown.len());
            return Err(core.bad_answer(ON_TEXT, expected, &got));
        }
        shown.drain(..taken_bytes);
        if !shown.is_empty() {
            self.held_bytes += shown.len();
            self.held.insert(channel, shown);
        }
        let limit_bytes = core.limits().held_bytes_max;
        if self.held_bytes > limit_bytes {
            let got = self.held_bytes;
            let limit = format!("text held back of at most {limit_bytes} bytes per request, held {got}");
            return Err(core.over_named(ON_TEXT, &limit, "held_bytes_max"));
        }
        self.let_out(core, ON_TEXT, passage.text)
    }

    /// Counts what leaves.
    fn let_out(&mut self, core: &GuestCore, call: &'static str, text: String) -> Result<String, GuestError> {
        self.let_out_bytes = self.let_out_bytes.saturating_add(text.len());
        check_let_out(core, call, self.let_out_bytes)?;
        Ok(text)
    }
}

impl Session {
    /// Runs `step`, unless an earlier one failed; its failure ends the session and frees the instance.
    fn step<T>(
        &mut self,
        step: impl FnOnce(&GuestCore, &mut Flow, &mut Live) -> Result<T, FilterError>,
    ) -> Result<T, FilterError> {
        let live = self.state.as_mut().map_err(|error| error.clone())?;
        let result = step(&self.core, &mut self.flow, live);
        if let Err(error) = &result {
            self.state = Err(error.clone());
        }
        result
    }
}

impl FilterSession for Session {
    fn on_request(&mut self, request: &FilterRequest) -> Result<Verdict, FilterError> {
        let request = convert::filter::to_guest(request);
        self.step(|core, _, live| {
            let limit = core.limits().request_deadline;
            let Live {
                store,
                filter,
                resource,
            } = live;
            let session = filter.galerne_filter_filtering().session();
            match core.call(store, ON_REQUEST, limit, |store| {
                session.call_on_request(store, *resource, &request)
            })? {
                wit::Verdict::Pass => Ok(Verdict::Pass),
                wit::Verdict::Rewrite(request) => match convert::filter::from_guest(request) {
                    Ok(request) => Ok(Verdict::Rewrite(request)),
                    Err(error) => {
                        let got = error.to_string();
                        Err(core.bad_answer(ON_REQUEST, RequestError::EXPECTED, &got).into())
                    }
                },
                wit::Verdict::Refuse(refusal) => Err(refused(core, ON_REQUEST, &refusal)),
            }
        })
    }

    fn on_text(&mut self, channel: Channel, text: &str) -> Result<String, FilterError> {
        self.step(|core, flow, live| {
            if text.is_empty() {
                return Ok(String::new());
            }
            let shown = flow.show(channel, text);
            let limit = core.limits().step_deadline;
            let Live {
                store,
                filter,
                resource,
            } = live;
            let session = filter.galerne_filter_filtering().session();
            let passage = core
                .call(store, ON_TEXT, limit, |store| {
                    session.call_on_text(store, *resource, convert::filter::channel(channel), &shown)
                })?
                .map_err(|refusal| refused(core, ON_TEXT, &refusal))?;
            Ok(flow.pass(core, channel, shown, passage)?)
        })
    }

    fn finish(&mut self, channel: Channel) -> Result<String, FilterError> {
        self.step(|core, flow, live| {
            let held = flow.show(channel, "");
            let limit = core.limits().step_deadline;
            let Live {
                store,
                filter,
                resource,
            } = live;
            let session = filter.galerne_filter_filtering().session();
            let text = core
                .call(store, FINISH, limit, |store| {
                    session.call_finish(store, *resource, convert::filter::channel(channel), &held)
                })?
                .map_err(|refusal| refused(core, FINISH, &refusal))?;
            Ok(flow.let_out(core, FINISH, text)?)
        })
    }
}

fn refused(core: &GuestCore, call: &'static str, refusal: &wit::Refusal) -> FilterError {
    checked_refusal(core, call, refusal.status, &refusal.reason)
}

/// Whether a request may let out so much.
pub(crate) fn check_let_out(core: &GuestCore, call: &'static str, got: usize) -> Result<(), GuestError> {
    let limit_bytes = core.limits().filtered_bytes_max;
    if got > limit_bytes {
        let limit = format!("text let out of at most {limit_bytes} bytes per request, wanted {got}");
        return Err(core.over_named(call, &limit, "filtered_bytes_max"));
    }
    Ok(())
}

/// The guest's own refusal, or its fault if the status is none of a refusal.
pub(crate) fn checked_refusal<E: From<Refusal> + From<GuestError>>(
    core: &GuestCore,
    call: &'static str,
    status: u16,
    reason: &str,
) -> E {
    if !(Refusal::STATUS_MIN..=Refusal::STATUS_MAX).contains(&status) {
        let expected = "a refusal's status from 400 to 599";
        return core.bad_answer(call, expected, &status.to_string()).into();
    }
    Refusal {
        guest: core.name.to_string(),
        status,
        reason: bounded(reason),
    }
    .into()
}
