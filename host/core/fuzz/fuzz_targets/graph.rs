//! Foreign bytes as a JSON graph with weights, through the gate. Fails on a panic, and on a graph that is accepted
//! though it breaks an invariant. The corpus also runs as `host/core/tests/corpus.rs`.
#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _judged_without_panic = support::run_case(bytes);
});
