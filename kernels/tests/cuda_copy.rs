//! `copy.cu` and `mean_pool.cu` on the CPU shim (or a GPU).
#![expect(unsafe_code, reason = "launches name raw memory")]

use galerne_cuda_shim::{Rig, numbers};
use galerne_kernels::cuda::driver::Launch;
use galerne_kernels::cuda::launch::copy::{Groups, copy_columns, gather_rows};
use galerne_kernels::cuda::launch::mean_pool::mean_pool;

fn run(rig: &Rig, launch: Launch) {
    // SAFETY: each test's memory is as large as its shapes say.
    unsafe { rig.enqueue(&[launch]) }.expect("it runs");
}

fn check_columns(rows: u32, groups: Groups, (x_start, out_start): (u32, u32)) {
    let rig = Rig::new(u64::from(rows));
    let x_width = groups.groups.saturating_sub(1) * groups.x_stride + groups.group;
    let out_width = groups.groups.saturating_sub(1) * groups.out_stride + groups.group;
    let (x_stride, out_stride) = (x_start + x_width + 4, out_start + out_width + 4);
    let x = numbers((rows * x_stride) as usize, 1, 0.0);
    let out = numbers((rows * out_stride) as usize, 2, 9.0);
    let (x_memory, out_memory) = (rig.memory(&x), rig.memory(&out));
    let launch = copy_columns(
        x_memory.view(x_stride, x_start, x_width),
        out_memory.view(out_stride, out_start, out_width),
        groups,
        rows,
    );
    run(&rig, launch);
    let mut expected = out;
    for row in 0..rows {
        for g in 0..groups.groups {
            for i in 0..groups.group {
                let to = row * out_stride + out_start + g * groups.out_stride + i;
                let from = row * x_stride + x_start + g * groups.x_stride + i;
                expected[to as usize] = x[from as usize];
            }
        }
    }
    assert_eq!(out_memory.read(), expected, "{groups:?}");
}

#[test]
fn groups_of_columns_are_copied_and_others_stay() {
    let groups = |group, groups, x_stride, out_stride| Groups {
        group,
        groups,
        x_stride,
        out_stride,
    };
    check_columns(3, groups(64, 5, 192, 64), (0, 0));
    check_columns(3, groups(64, 5, 64, 128), (4, 64));
    check_columns(2, groups(7, 3, 9, 8), (1, 2));
    check_columns(2, groups(8, 3, 9, 8), (0, 0));
    check_columns(700, groups(37, 1, 0, 0), (3, 0));
    check_columns(0, groups(4, 1, 0, 0), (0, 0));
    check_columns(3, groups(4, 0, 4, 4), (0, 0));
    // Several vectors per thread.
    check_columns(1_100, groups(241, 1, 0, 0), (0, 0));
}

#[test]
fn listed_rows_are_gathered() {
    for width in [64_u32, 33] {
        let rig = Rig::new(4);
        let x = numbers(10 * width as usize, 1, 0.0);
        let indices = [9_u32, 0, 3, 3];
        let (x_memory, list) = (rig.memory(&x), rig.memory(&indices));
        let out = rig.poisoned::<f32>(4 * width as usize);
        let launch = gather_rows(
            x_memory.view(width, 0, width),
            out.view(width, 0, width),
            list.at(),
            4,
        );
        run(&rig, launch);
        let rows = indices
            .iter()
            .map(|&row| &x[(row * width) as usize..][..width as usize]);
        assert_eq!(out.read(), rows.collect::<Vec<_>>().concat());
    }
}

#[test]
fn sequences_are_averaged() {
    // Sequences of 1, 0 (padding), 6 and 700 rows; widths that are a multiple of 4 and not.
    let (first_rows, row_counts) = ([0_u32, 0, 1, 7], [1_u32, 0, 6, 700]);
    for width in [640_usize, 131] {
        let rig = Rig::new(2);
        let x = numbers(707 * width, 1, 0.3);
        let x_memory = rig.memory(&x);
        let (first, counts) = (rig.memory(&first_rows), rig.memory(&row_counts));
        let out = rig.poisoned::<f32>(4 * width);
        let columns = width as u32;
        let launch = mean_pool(
            x_memory.view(columns, 0, columns),
            out.view(columns, 0, columns),
            (first.at(), counts.at()),
            4,
        );
        run(&rig, launch);
        for (i, got) in out.read().into_iter().enumerate() {
            let (sequence, column) = (i / width, i % width);
            let (first, count) = (first_rows[sequence] as usize, row_counts[sequence] as usize);
            let sum: f64 = (first..first + count)
                .map(|row| f64::from(x[row * width + column]))
                .sum();
            let expected = sum / count.max(1) as f64;
            // Four sums of 175 numbers below 1.3 each: their roundings, of 2^-24 of sums below 230, do not all go one way.
            assert!(
                (f64::from(got) - expected).abs() < 2e-6,
                "sequence {sequence} column {column}: expected {expected}, got {got}"
            );
        }
    }
}
