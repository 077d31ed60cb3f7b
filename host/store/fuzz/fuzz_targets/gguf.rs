//! Foreign bytes as a gguf header. Fails on a panic, and on a tensor that is accepted though it lies outside the file
//! or inside another. The corpus also runs as `host/store/tests/corpus.rs`.
#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _judged_without_panic = support::Format::Gguf.read(bytes);
});
