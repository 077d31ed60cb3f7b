//! One guest's identity and limits, and the one way its code is called. Knows no world's functions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_core::capability::{Capabilities, CapabilitySession, Grants};
use galerne_core::filter::RequestInfo;
use galerne_core::guest::GuestError;
use galerne_core::limits::{Allowance, GuestLimits};
use wasmtime::component::{Instance, InstancePre};
use wasmtime::{Store, UpdateDeadline};

use crate::errors::{CallContext, bounded, reasons};
use crate::host::HostShared;
use crate::limiter::StoreState;
use crate::runtime::ticks;
use crate::standing;

/// Epochs after which a call stands back: it has run for one of them at least.
const SOON_TICKS: u64 = 2;

/// What every kind of guest has. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct GuestCore {
    /// The host it was loaded by.
    pub(crate) host: Arc<HostShared>,
    /// For messages.
    pub(crate) name: Arc<str>,
    /// Package, world and version.
    pub(crate) world: &'static str,
    /// Its bounds, and who can raise them.
    pub(crate) allowance: Arc<Allowance>,
    /// What it may do outside itself, if anything.
    pub(crate) capabilities: Option<Arc<dyn Capabilities>>,
}

impl GuestCore {
    /// The bounds of this guest.
    pub(crate) fn limits(&self) -> &GuestLimits {
        &self.allowance.limits.guest
    }

    /// An empty store with all limits set except the deadline, which each call sets.
    pub(crate) fn store(&self) -> Store<StoreState> {
        let limits = self.limits();
        let mut store = Store::new(&self.host.engine, StoreState::new(limits));
        store.limiter(|state| state);
        store.set_hostcall_fuel(limits.call_alloc_bytes_max);
        store.set_max_component_handles(limits.handles_max);
        if self.host.options.count_fuel {
            // It never runs out: time is what bounds a call. Refused only where fuel is not counted.
            let _ = store.set_fuel(u64::MAX);
        }
        store.epoch_deadline_callback(|mut store| {
            // A call that is not over soon must not be in anybody's way.
            standing::stand_back();
            let state = store.data_mut();
            // What a call waited for the host is not its own time.
            let waited = state.asking().take_waited();
            let later = std::mem::take(&mut state.later_ticks);
            Ok(match (later, waited.is_zero()) {
                (0, true) => UpdateDeadline::Interrupt,
                (later, true) => UpdateDeadline::Continue(later),
                (later, false) => UpdateDeadline::Continue(later + ticks(waited)),
            })
        });
        store
    }

    /// What it may import.
    pub(crate) fn grants(&self) -> Grants {
        let capabilities = self.capabilities.as_ref();
        capabilities.map_or_else(Grants::default, |capabilities| capabilities.grants().clone())
    }

    /// Who answers the questions of this guest in one request, if it may ask any.
    pub(crate) fn capability_session(&self, info: &RequestInfo) -> Option<Box<dyn CapabilitySession>> {
        let capabilities = self.capabilities.as_ref()?;
        Some(capabilities.session(&self.name, info))
    }

    /// Instantiates once, and drops the instance: a guest that cannot start, or whose exports have other types than
    /// its world's, is refused when it is loaded and not at its first request.
    pub(crate) fn try_out<T>(
        &self,
        pre: &InstancePre<StoreState>,
        bind: impl FnOnce(&mut Store<StoreState>, &Instance) -> wasmtime::Result<T>,
    ) -> Result<(), GuestError> {
        let mut store = self.store();
        let limit = self.limits().request_deadline;
        let instance = self.call(&mut store, "load", limit, |store| pre.instantiate(store))?;
        bind(&mut store, &instance).map(drop).map_err(|error| {
            self.link_reason(format!(
                "an export has another type than in the contract: {}",
                reasons(&error)
            ))
        })
    }

    /// Runs guest code. After an error the store must be dropped: the guest may have stopped anywhere.
    pub(crate) fn call<T>(
        &self,
        store: &mut Store<StoreState>,
        call: &'static str,
        limit: Duration,
        run: impl FnOnce(&mut Store<StoreState>) -> wasmtime::Result<T>,
    ) -> Result<T, GuestError> {
        self.call_waiting(store, call, limit, self.limits().wait_max, run)
    }

    /// The same for a call that may wait for the host as long as `wait_max`.
    pub(crate) fn call_waiting<T>(
        &self,
        store: &mut Store<StoreState>,
        call: &'static str,
        limit: Duration,
        wait_max: Duration,
        run: impl FnOnce(&mut Store<StoreState>) -> wasmtime::Result<T>,
    ) -> Result<T, GuestError> {
        // A growth refused in an earlier call, which the guest survived, must not explain this one's failure.
        store.data_mut().take_denied();
        store.data_mut().asking().begin(wait_max);
        let limit_ticks = ticks(limit);
        store.data_mut().later_ticks = limit_ticks.saturating_sub(SOON_TICKS);
        store.set_epoch_deadline(SOON_TICKS.min(limit_ticks));
        let fuel = self.fuel_left(store);
        let begin = Instant::now();
        let result = match &self.host.share {
            Some(share) => share.pay_for(|| run(store)),
            None => run(store),
        };
        let state = store.data_mut();
        let waited = wait_max.saturating_sub(state.asking().left());
        let own = begin.elapsed().saturating_sub(waited);
        state.last_call = own;
        self.host.counters.called(own, state.memory_bytes());
        if let (Some(before), Some(after)) = (fuel, self.fuel_left(store)) {
            self.host.counters.spent(&self.name, before.saturating_sub(after));
        }
        result.map_err(|error| {
            let denied = store.data_mut().take_denied();
            let context = CallContext {
                guest: &self.name,
                call,
                limit,
                allowance: &self.allowance,
                denied,
            };
            self.counted(context.error(&error))
        })
    }

    /// What a store has left, where that is counted.
    fn fuel_left(&self, store: &Store<StoreState>) -> Option<u64> {
        let counted = self.host.options.count_fuel;
        counted.then(|| store.get_fuel().ok()).flatten()
    }

    /// The error, counted.
    pub(crate) fn counted(&self, error: GuestError) -> GuestError {
        self.host.counters.note(&error);
        error
    }

    /// The guest said no, in its own words.
    pub(crate) fn refused(&self, call: &'static str, message: &str) -> GuestError {
        GuestError::Refused {
            guest: self.name.to_string(),
            call: call.into(),
            message: bounded(message),
        }
    }

    /// The guest's answer is not one its contract allows.
    pub(crate) fn bad_answer(&self, call: &'static str, expected: &'static str, got: &str) -> GuestError {
        self.counted(GuestError::Answer {
            guest: self.name.to_string(),
            call: call.into(),
            expected: expected.into(),
            got: bounded(got),
        })
    }

    /// The guest went past the limit of this name, which the host counts itself.
    pub(crate) fn over_named(&self, call: &'static str, limit: &str, name: &str) -> GuestError {
        self.over_limit(call, format!("{limit} ({})", self.allowance.who(name)))
    }

    /// The guest went past a limit, in words that name it.
    pub(crate) fn over_limit(&self, call: &'static str, limit: String) -> GuestError {
        self.counted(GuestError::Limit {
            guest: self.name.to_string(),
            call: call.into(),
            limit,
        })
    }

    /// The process that did the work for this guest is gone.
    pub(crate) fn process_gone(&self, call: &'static str, reason: String) -> GuestError {
        self.counted(GuestError::Process {
            guest: self.name.to_string(),
            call: call.into(),
            reason,
        })
    }

    /// Something of this host went wrong in the guest's call.
    pub(crate) fn host_bug(&self, call: &'static str, bug: &str) -> GuestError {
        tracing::error!(guest = %self.name, call, bug, "bug of the host in a guest's call");
        GuestError::Trap {
            guest: self.name.to_string(),
            call: call.into(),
            reason: format!("bug of the host: {bug}"),
        }
    }

    /// The component does not fit its world.
    pub(crate) fn link_error(&self, error: &wasmtime::Error) -> GuestError {
        self.link_reason(reasons(error))
    }

    /// The component does not fit its world.
    pub(crate) fn link_reason(&self, reason: String) -> GuestError {
        GuestError::Link {
            guest: self.name.to_string(),
            world: self.world.into(),
            reason,
        }
    }
}
