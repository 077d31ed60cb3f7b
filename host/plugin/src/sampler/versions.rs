//! The exports of a sampler, called with core's types whatever version of the contract it has: the only place that knows
//! there are several.

use galerne_core::guest::{GuestError, PlanStep, SequenceInfo};
use galerne_core::sampling::Candidate;
use wasmtime::Store;
use wasmtime::component::{InstancePre, ResourceAny};

use super::GuestPlan;
use crate::bindings::{sampling_0_1, sampling_0_2};
use crate::convert::{sampling, sampling_0_1 as old};
use crate::inspect;
use crate::instance::GuestCore;
use crate::limiter::StoreState;

/// The newest version there is.
const NEWEST: &str = "galerne:sampling/sampling@0.2.0";

/// A sampler before its first instance.
pub(super) enum Linked {
    V0_1(sampling_0_1::SamplerPre<StoreState>),
    V0_2(sampling_0_2::SamplerPre<StoreState>),
}

/// An instance of a sampler.
pub(super) enum Sampler {
    V0_1(sampling_0_1::Sampler),
    V0_2(sampling_0_2::Sampler),
}

impl Linked {
    /// In the newest version that the guest and this host speak. Starts an instance once.
    pub(super) fn new(core: &GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let exports = inspect::exports(&core.host.engine, pre.component());
        let linked = if exports.iter().any(|export| export == NEWEST) {
            sampling_0_2::SamplerPre::new(pre).map(Self::V0_2)
        } else {
            sampling_0_1::SamplerPre::new(pre).map(Self::V0_1)
        };
        let linked = linked.map_err(|error| core.link_error(&error))?;
        match &linked {
            Self::V0_1(pre) => core.try_out(pre.instance_pre(), |store, instance| {
                sampling_0_1::Sampler::new(store, instance)
            }),
            Self::V0_2(pre) => core.try_out(pre.instance_pre(), |store, instance| {
                sampling_0_2::Sampler::new(store, instance)
            }),
        }?;
        Ok(linked)
    }

    pub(super) fn instantiate(&self, store: &mut Store<StoreState>) -> wasmtime::Result<Sampler> {
        Ok(match self {
            Self::V0_1(pre) => Sampler::V0_1(pre.instantiate(store)?),
            Self::V0_2(pre) => Sampler::V0_2(pre.instantiate(store)?),
        })
    }
}

impl Sampler {
    pub(super) fn create(
        &self,
        store: &mut Store<StoreState>,
        info: &SequenceInfo<'_>,
    ) -> wasmtime::Result<Result<ResourceAny, String>> {
        match self {
            Self::V0_1(sampler) => sampler
                .galerne_sampling_sampling()
                .session()
                .call_create(store, &old::info(info)),
            Self::V0_2(sampler) => sampler
                .galerne_sampling_sampling()
                .session()
                .call_create(store, &sampling::info(info)),
        }
    }

    pub(super) fn plan(
        &self,
        store: &mut Store<StoreState>,
        session: ResourceAny,
        step: &PlanStep,
    ) -> wasmtime::Result<GuestPlan> {
        match self {
            Self::V0_1(sampler) => sampler
                .galerne_sampling_sampling()
                .session()
                .call_plan(store, session, &old::step(step))
                .map(old::plan),
            Self::V0_2(sampler) => sampler
                .galerne_sampling_sampling()
                .session()
                .call_plan(store, session, &sampling::step(step))
                .map(sampling::plan),
        }
    }

    /// The index the guest gives, whatever it is.
    pub(super) fn choose(
        &self,
        store: &mut Store<StoreState>,
        session: ResourceAny,
        candidates: &[Candidate],
    ) -> wasmtime::Result<u32> {
        match self {
            Self::V0_1(sampler) => sampler.galerne_sampling_sampling().session().call_choose(
                store,
                session,
                &old::candidates(candidates),
            ),
            Self::V0_2(sampler) => sampler.galerne_sampling_sampling().session().call_choose(
                store,
                session,
                &sampling::candidates(candidates),
            ),
        }
    }
}
