//! The CPU device against the conformance suite, with every instruction set of this machine; and what the CPU
//! promises beyond it.

mod support;

use galerne_core::dtype::DType;
use galerne_core::ids::{BlockId, TokenId};
use galerne_kernels::conformance::{Build, cases};
use galerne_kernels::cpu::{CpuDevice, CpuOptions, Isa};
use galerne_kernels::device::{
    Device, DeviceError, KvDtype, KvSpec, LoadOptions, Precision, SequenceSlice, StepBatch,
};
use support::device;

fn conforms(isa: Isa, precision: Precision) {
    let Some(device) = device(isa, 2) else { return };
    for case in cases() {
        if let Err(error) = case.run(&device, precision) {
            panic!("{isa} {precision:?}: {error}");
        }
    }
}

#[test]
fn portable_auto() {
    conforms(Isa::Portable, Precision::Auto);
}

#[test]
fn portable_f32() {
    conforms(Isa::Portable, Precision::F32);
}

#[test]
fn avx2_auto() {
    conforms(Isa::Avx2, Precision::Auto);
}

#[test]
fn avx2_f32() {
    conforms(Isa::Avx2, Precision::F32);
}

#[test]
fn avx512_auto() {
    conforms(Isa::Avx512, Precision::Auto);
}

#[test]
fn avx512_f32() {
    conforms(Isa::Avx512, Precision::F32);
}

#[test]
fn avx512_bf16_auto() {
    conforms(Isa::Avx512Bf16, Precision::Auto);
}

#[test]
fn amx_auto() {
    conforms(Isa::Amx, Precision::Auto);
}

fn outputs(
    device: &CpuDevice,
    build: &Build,
    (precision, dtype): (Precision, KvDtype),
    chunks: &[usize],
    company: usize,
) -> Vec<f32> {
    let options = LoadOptions {
        precision,
        quantization: None,
        kv: KvSpec {
            blocks: 128,
            block_tokens: 16,
            dtype,
        },
        step_tokens_max: 512,
        sequences_max: 8,
    };
    let mut program = device
        .load(&build.program, &build.weights, options)
        .expect("load");
    let (mut position, mut all) = (0, vec![]);
    for &tokens in chunks {
        let mut batch = StepBatch::default();
        for lane in 0..=company {
            let first_token = batch.tokens.len();
            let token = |i: usize| TokenId(((position + i) * 7 + lane * 3) as u32 % 50);
            batch.tokens.extend((0..tokens).map(token));
            let blocks = (0..(position + tokens).div_ceil(16) as u32)
                .map(|b| BlockId(b * 8 + lane as u32))
                .collect();
            batch.sequences.push(SequenceSlice {
                first_token,
                tokens,
                position: position as u32,
                blocks,
            });
        }
        batch.output_rows = (0..tokens).collect();
        program.submit(&batch).expect("submit");
        all.extend(program.read_output().expect("output"));
        position += tokens;
    }
    all
}

/// The CPU promises more than the suite asks: not one bit depends on batch, chunks or threads.
#[test]
fn results_do_not_depend_on_batch_chunks_or_threads() {
    for isa in Isa::ALL {
        for precision in [Precision::Auto, Precision::F32] {
            for dtype in [DType::Q4_1, DType::Q8_0, DType::Q5K, DType::Q6K, DType::Bf16] {
                let build = Build::transformer(dtype, 2, 3);
                let Some(one) = device(isa, 1) else { continue };
                let Some(three) = device(isa, 3) else { continue };
                let expected = outputs(&one, &build, (precision, KvDtype::default()), &[40], 0);
                for (chunks, company) in [
                    (vec![40], 2),
                    (vec![1, 39], 0),
                    (vec![17, 4, 2, 1, 16], 1),
                    (vec![8; 5], 3),
                ] {
                    for device in [&one, &three] {
                        let got = outputs(device, &build, (precision, KvDtype::default()), &chunks, company);
                        assert_eq!(
                            expected, got,
                            "{isa} {precision:?} {dtype} {chunks:?} with {company} others"
                        );
                    }
                }
            }
        }
    }
}

/// The same over several tiles of keys, for each way to store them.
#[test]
fn long_contexts_do_not_depend_on_batch_chunks_or_threads() {
    for isa in Isa::ALL {
        for dtype in [
            KvDtype::Bf16,
            KvDtype::F16,
            KvDtype::F32,
            KvDtype::Int8,
            KvDtype::Fp8,
        ] {
            let mut build = Build::transformer(DType::Q8_0, 2, 3);
            build.program.layers[1].sliding_window = Some(70);
            let Some(one) = device(isa, 1) else { continue };
            let Some(three) = device(isa, 3) else { continue };
            let precision = (Precision::Auto, dtype);
            let expected = outputs(&one, &build, precision, &[150], 0);
            for (chunks, company) in [
                (vec![150], 1),
                (vec![1, 149], 0),
                (vec![63, 2, 64, 21], 2),
                (vec![147, 1, 1, 1], 1),
            ] {
                for device in [&one, &three] {
                    let got = outputs(device, &build, precision, &chunks, company);
                    assert_eq!(
                        expected, got,
                        "{isa} KV in {dtype:?} {chunks:?} with {company} others"
                    );
                }
            }
        }
    }
}

#[test]
fn an_instruction_set_the_machine_lacks_is_an_error() {
    if let Some(isa) = Isa::ALL.into_iter().find(|isa| *isa > Isa::detect()) {
        let error = CpuDevice::new(CpuOptions {
            threads: None,
            isa: Some(isa),
        })
        .err();
        assert!(
            matches!(error, Some(DeviceError::Unsupported { .. })),
            "{error:?}"
        );
    }
    assert!(Isa::detect() >= Isa::Portable);
}

#[test]
fn tied_weights_are_held_once() {
    let mut build = Build::transformer(DType::Q8_0, 1, 1);
    let device = device(Isa::Portable, 1).expect("portable");
    let options = LoadOptions {
        precision: Precision::Auto,
        quantization: None,
        kv: KvSpec {
            blocks: 4,
            block_tokens: 16,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 16,
        sequences_max: 1,
    };
    let held = |build: &Build| {
        device
            .load(&build.program, &build.weights, options)
            .expect("load")
            .memory()
            .weight_bytes
    };
    let before = held(&build);
    let last = build.program.weights.len() - 1;
    let head = build.program.weights[last].parts[0].clone();
    build.program.weights[0].parts[0] = head;
    assert!(
        held(&build) < before,
        "the embedding table is now the output matrix: one copy"
    );
}

#[test]
fn a_program_that_leaves_its_buffers_is_refused() {
    let mut build = Build::transformer(DType::F32, 1, 1);
    build.program.output.start = 1;
    let device = device(Isa::Portable, 1).expect("portable");
    let options = LoadOptions {
        precision: Precision::F32,
        quantization: None,
        kv: KvSpec {
            blocks: 4,
            block_tokens: 16,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 16,
        sequences_max: 1,
    };
    let error = device.load(&build.program, &build.weights, options).err();
    assert!(matches!(error, Some(DeviceError::Program { .. })), "{error:?}");
}
