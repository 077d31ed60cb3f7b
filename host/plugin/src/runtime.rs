//! The wasmtime engine, its settings, and the thread that advances its epoch. Knows no guest.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use galerne_core::limits::GuestLimits;
use wasmtime::component::Component;
use wasmtime::{Config, Enabled, Engine, PoolingAllocationConfig};

use crate::artifact::Artifact;
use crate::errors::{PluginError, reasons};
use crate::limiter::{CORE_INSTANCES_MAX, MEMORIES_MAX, TABLES_MAX};

/// Time between epochs. Deadlines are tens of milliseconds and more, and a hundred wake-ups a second cost nothing.
const TICK: Duration = Duration::from_millis(10);
/// Wasm stack of one call; leaves three quarters of a default thread stack to the host.
const WASM_STACK_BYTES: usize = 512 << 10;
/// Metadata of one core instance: tens of bytes per function and global. A 1 MB guest needs about 100 KB.
const CORE_INSTANCE_BYTES_MAX: usize = 512 << 10;
/// Metadata of one component instance, all its core instances with it. CPython needs 402 KiB.
const COMPONENT_INSTANCE_BYTES_MAX: usize = 512 << 10;
/// Memory a freed slot keeps mapped and clears by writing: cheaper than handing a small guest's few pages back.
const KEEP_RESIDENT_BYTES: usize = 128 << 10;

/// An engine with a pool of `instances_max` instances, and its running epoch thread.
pub(crate) fn engine(
    limits: &GuestLimits,
    instances_max: u32,
    count_fuel: bool,
) -> Result<Engine, PluginError> {
    let engine =
        Engine::new(&config(limits, instances_max, count_fuel)).map_err(|error| PluginError::Runtime {
            instances_max,
            reason: reasons(&error),
        })?;
    let weak = engine.weak();
    // Every store, component and host holds the engine; when the last is gone the thread ends at its next tick.
    std::thread::Builder::new()
        .name("guest-epoch".to_owned())
        .spawn(move || {
            while let Some(engine) = weak.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(TICK);
            }
        })?;
    Ok(engine)
}

/// An engine that only compiles: its code is what [`engine`] would make.
pub(crate) fn compiling_engine(limits: &GuestLimits, count_fuel: bool) -> Result<Engine, PluginError> {
    Engine::new(&config(limits, 1, count_fuel)).map_err(|error| PluginError::Runtime {
        instances_max: 1,
        reason: reasons(&error),
    })
}

/// The runtime's version and all settings that change compiled code, as one number.
pub(crate) fn compatibility(engine: &Engine) -> u64 {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    hasher.finish()
}

/// The component of compiled code.
#[expect(
    unsafe_code,
    reason = "loading compiled code is running it; the runtime cannot check it"
)]
pub(crate) fn deserialize(engine: &Engine, artifact: &Artifact) -> wasmtime::Result<Component> {
    // SAFETY: an artifact is made by `Artifact::trusted`, from the answer of this host's own compiler, or by
    // `ArtifactFolder::get`, from a file whose MAC says the same; see there.
    unsafe { Component::deserialize(engine, artifact.bytes()) }
}

/// The number of epochs after which a call has surely had its time: one more, since the first may be almost over.
pub(crate) fn ticks(limit: Duration) -> u64 {
    let ticks = limit.as_nanos().div_ceil(TICK.as_nanos());
    // Added to the current epoch by the runtime; kept far from overflow.
    u64::try_from(ticks).unwrap_or(u64::MAX).min(u64::MAX >> 8) + 1
}

fn config(limits: &GuestLimits, instances_max: u32, count_fuel: bool) -> Config {
    let mut config = Config::new();
    config
        .allocation_strategy(pool(limits, instances_max))
        .epoch_interruption(true)
        .consume_fuel(count_fuel)
        .max_wasm_stack(WASM_STACK_BYTES)
        .concurrency_support(false)
        .wasm_component_model(true);
    // Compiled in, because builds without them have known aborts, and switched off here: guests do not need them
    // and each is more runtime to trust.
    config
        .wasm_threads(false)
        .shared_memory(false)
        .wasm_gc(false)
        .wasm_function_references(false)
        .wasm_exceptions(false)
        .gc_support(false)
        .wasm_memory64(false)
        .wasm_stack_switching(false)
        .wasm_relaxed_simd(false);
    // Guests are stripped; addresses in their code tell nobody anything.
    config.wasm_backtrace_max_frames(None);
    config
}

fn pool(limits: &GuestLimits, instances_max: u32) -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(instances_max)
        .total_core_instances(instances_max.saturating_mul(CORE_INSTANCES_MAX))
        .total_memories(instances_max)
        .total_tables(instances_max.saturating_mul(2))
        // Calls are plain calls: there are no fibers.
        .total_stacks(0)
        .total_gc_heaps(0)
        .max_core_instances_per_component(CORE_INSTANCES_MAX)
        .max_memories_per_component(MEMORIES_MAX)
        .max_tables_per_component(TABLES_MAX)
        .max_component_instance_size(COMPONENT_INSTANCE_BYTES_MAX)
        .max_core_instance_size(CORE_INSTANCE_BYTES_MAX)
        .max_memories_per_module(1)
        .max_tables_per_module(TABLES_MAX)
        .max_memory_size(limits.memory_bytes_max)
        .table_elements(limits.table_elements_max)
        .linear_memory_keep_resident(KEEP_RESIDENT_BYTES)
        .table_keep_resident(4 << 10)
        .pagemap_scan(Enabled::No);
    pool
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_never_cut_short() {
        for (limit_ms, expected) in [(0, 1), (1, 2), (10, 2), (11, 3), (100, 11)] {
            assert_eq!(ticks(Duration::from_millis(limit_ms)), expected, "{limit_ms} ms");
        }
        assert!(ticks(Duration::MAX) < u64::MAX / 2);
    }
}
