//! What the shim promises of threads: exchanges, barriers that matter, copies that have to be waited for, deadlocks, faults.
#![expect(unsafe_code, reason = "launches name raw memory")]

use bytemuck::{Pod, Zeroable};
use galerne_cuda_shim::{Shim, kernels};
use galerne_kernels::cuda::driver::{DevicePtr, Driver, DriverError, Launch};

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TestParams {
    input: DevicePtr,
    out: DevicePtr,
    mode: u32,
    count: u32,
}

/// A launch of as many blocks of as many threads, with 32 KiB of shared memory.
fn launch(
    kernel: &'static str,
    (blocks, threads): (u32, u32),
    (input, out): (DevicePtr, DevicePtr),
    (mode, count): (u32, u32),
) -> Launch {
    let params = TestParams {
        input,
        out,
        mode,
        count,
    };
    Launch::new(kernel, [blocks, 1, 1], threads, 32 << 10, &params)
}

fn run(shim: &Shim, launch: Launch) -> Result<(), DriverError> {
    // SAFETY: the tests' memory is as large as the kernels' comments say.
    unsafe { shim.enqueue(&[launch]) }
}

fn reason(result: Result<(), DriverError>) -> String {
    result.expect_err("the kernel fails").to_string()
}

#[test]
fn a_block_adds_up_whatever_the_order_of_its_threads() {
    for (seed, threads) in [32, 64, 96, 1_024].into_iter().enumerate() {
        let shim = Shim::new(seed as u64);
        let numbers: Vec<f32> = (0..3 * threads).map(|i| i as f32).collect();
        let (input, out) = (shim.memory(&numbers), shim.poisoned::<f32>(3));
        run(
            &shim,
            launch("test_block_sum", (3, threads), (input.at(), out.at()), (0, 0)),
        )
        .expect("it runs");
        let sums: Vec<f32> = numbers
            .chunks(threads as usize)
            .map(|block| block.iter().sum())
            .collect();
        assert_eq!(out.read(), sums, "{threads} threads");
    }
}

#[test]
fn lanes_exchange_within_their_warp() {
    let shim = Shim::new(1);
    let out = shim.poisoned::<[u32; 5]>(128);
    run(
        &shim,
        launch("test_exchanges", (1, 128), (DevicePtr::NULL, out.at()), (0, 0)),
    )
    .expect("it runs");
    for (thread, got) in (0_u32..).zip(out.read()) {
        let (lane, first) = (thread % 32, thread / 32 * 32);
        let ballot = (0..32).fold(0, |bits, i| bits | u32::from((first + i) % 3 == 0) << i);
        let expected = [
            first + (lane ^ 5),
            first + thread * 7 % 32,
            if lane < 3 { thread } else { thread - 3 },
            ballot,
            (thread ^ 1) + 1,
        ];
        assert_eq!(got, expected, "thread {thread}");
    }
}

#[test]
fn a_missing_barrier_shows_under_some_seed() {
    let wrong = |mode: u32, seed: u64, threads: u32| {
        let shim = Shim::new(seed);
        let out = shim.poisoned::<u32>(threads as usize);
        run(
            &shim,
            launch(
                "test_barrier",
                (1, threads),
                (DevicePtr::NULL, out.at()),
                (mode, 0),
            ),
        )
        .expect("it runs");
        let opposite: Vec<u32> = (0..threads).rev().collect();
        out.read() != opposite
    };
    for threads in [2, 32, 256] {
        assert!(
            (0..8).any(|seed| wrong(0, seed, threads)),
            "{threads} threads without a barrier"
        );
        assert!(
            !(0..8).any(|seed| wrong(1, seed, threads)),
            "{threads} threads with a barrier"
        );
    }
}

#[test]
fn threads_that_wait_for_each_other_are_an_error() {
    let shim = Shim::new(3);
    for (mode, expected) in [
        (0, "40 have ended; 24 are at a block barrier;"),
        (1, "40 have ended"),
    ] {
        let result = run(
            &shim,
            launch(
                "test_deadlock",
                (2, 64),
                (DevicePtr::NULL, DevicePtr::NULL),
                (mode, 0),
            ),
        );
        let reason = reason(result);
        assert!(
            reason.contains("kernel test_deadlock: block (0, 0, 0)"),
            "{reason}"
        );
        // The second warp's lanes shuffle and wait at the barrier: neither goes on.
        let expected = if mode == 0 {
            expected
        } else {
            "24 are at a block barrier; 8 are at a shuffle"
        };
        assert!(reason.contains(expected), "{reason}");
    }
    // The fibers that were left behind are not run on.
    let out = shim.poisoned::<u32>(64);
    run(
        &shim,
        launch("test_barrier", (1, 64), (DevicePtr::NULL, out.at()), (1, 0)),
    )
    .expect("it runs");
    assert_eq!(out.read()[0], 63);
}

#[test]
fn a_launch_that_the_gpu_would_refuse_is_refused() {
    let shim = Shim::new(0);
    let good = launch(
        "test_deadlock",
        (1, 64),
        (DevicePtr::NULL, DevicePtr::NULL),
        (0, 0),
    );
    let refused = |change: fn(&mut Launch)| {
        let mut bad = good.clone();
        change(&mut bad);
        reason(run(&shim, bad))
    };
    assert!(refused(|launch| launch.threads = 1_025).contains("threads"));
    assert!(refused(|launch| launch.threads = 0).contains("threads"));
    assert!(refused(|launch| launch.grid[1] = 65_536).contains("blocks in y and z"));
    assert!(refused(|launch| launch.shared_bytes = 233_473).contains("shared memory"));
    assert!(
        refused(|launch| launch.params.truncate(16)).contains("bytes of parameters: expected 24, got 16")
    );
    assert!(refused(|launch| launch.kernel = "nothing").contains("kernel nothing is not in this build"));
    let mut empty = good;
    empty.grid[2] = 0;
    run(&shim, empty).expect("nothing runs");
}

#[test]
fn a_kernel_that_does_not_wait_for_those_before_it_is_an_error() {
    let result = run(
        &Shim::new(0),
        launch(
            "test_no_wait",
            (1, 32),
            (DevicePtr::NULL, DevicePtr::NULL),
            (0, 0),
        ),
    );
    assert!(reason(result).contains("ended without dependency_wait"));
}

#[test]
fn copies_are_there_only_after_the_wait() {
    let numbers: Vec<u32> = (0..512).collect();
    let copied = |mode: u32| {
        let shim = Shim::new(5);
        let (input, out) = (shim.memory(&numbers), shim.poisoned::<u32>(512));
        run(
            &shim,
            launch("test_copies", (1, 64), (input.at(), out.at()), (mode, 0)),
        )
        .expect("it runs");
        out.read()
    };
    assert_eq!(copied(0), numbers);
    assert_eq!(copied(1), vec![u32::MAX; 512]);
    assert_eq!(copied(2)[..256], numbers[..256]);
    assert_eq!(copied(2)[256..], vec![u32::MAX; 256]);
    assert_eq!(copied(3), vec![0; 512]);
}

#[test]
fn atomics_count_every_thread() {
    let shim = Shim::new(2);
    let out = shim.memory(&[0_u32, 0, 0, 0, 1_000]);
    run(
        &shim,
        launch("test_atomics", (3, 96), (DevicePtr::NULL, out.at()), (0, 0)),
    )
    .expect("it runs");
    assert_eq!(out.read(), [288, 0, 288, 95, 0]);
}

#[test]
fn a_graph_runs_its_launches_each_time() {
    let shim = Shim::new(2);
    let out = shim.memory(&[0_u32, 0, 0, 0, 1_000]);
    let launches = [
        launch("test_atomics", (1, 32), (DevicePtr::NULL, out.at()), (0, 0)),
        launch("test_atomics", (1, 64), (DevicePtr::NULL, out.at()), (0, 0)),
    ];
    let graph = shim.graph(&launches).expect("the kernels are there");
    for _ in 0..2 {
        // SAFETY: as above.
        unsafe { graph.enqueue() }.expect("it runs");
    }
    assert_eq!(out.read(), [192, 0, 192, 63, 0]);
}

#[test]
fn names_are_unique_and_memory_is_poisoned() {
    let mut names: Vec<String> = kernels().into_iter().map(|(name, _)| name).collect();
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all);
    let shim = Shim::new(0);
    let memory = shim.poisoned::<f32>(5);
    assert!(memory.read().iter().all(|x| x.is_nan()) && memory.at().0.is_multiple_of(16));
    let host = shim.allocate_host(100).expect("memory");
    assert!((host.0 as usize).is_multiple_of(64));
    // SAFETY: allocated above.
    unsafe { shim.release_host(host) };
}

/// Run in a process of its own by the test below.
#[test]
#[ignore = "ends the process"]
fn reads_past_the_end() {
    let shim = Shim::new(0);
    let (input, out) = (shim.memory(&[0.0_f32; 100]), shim.poisoned::<f32>(4));
    let fault = launch("test_read", (1, 1), (input.at(), out.at()), (0, 100));
    run(&shim, fault).expect("it does not return");
}

/// Run in a process of its own by the test below.
#[test]
#[ignore = "ends the process"]
fn reads_16_bytes_at_no_multiple_of_16() {
    let shim = Shim::new(0);
    let (input, out) = (shim.memory(&[0.0_f32; 100]), shim.poisoned::<f32>(4));
    let fault = launch("test_read", (1, 1), (input.at(), out.at()), (1, 0));
    run(&shim, fault).expect("it does not return");
}

#[test]
fn faults_end_the_process_with_the_kernels_name() {
    for test in ["reads_past_the_end", "reads_16_bytes_at_no_multiple_of_16"] {
        let output = std::process::Command::new(std::env::current_exe().expect("this test has a file"))
            .args(["--ignored", "--exact", "--nocapture", test])
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && output.status.code().is_none(),
            "{test}: {:?}",
            output.status
        );
        assert!(
            said.contains("shim: kernel test_read, block (0, 0, 0), thread 0"),
            "{test}: {said}"
        );
    }
}
