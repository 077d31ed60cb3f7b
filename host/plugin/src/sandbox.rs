//! How a worker process gives up what it does not need, before it reads anything foreign. Knows no guest.
//!
//! A process that went through here cannot open files, make sockets, start programs, look at other processes or get
//! new privileges: system calls are allowed by name ([`ALLOWED`]) and all others fail with EPERM. Landlock denies files and
//! network a second time where the kernel has it.

use std::collections::BTreeMap;

use landlock::{ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, Scope};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// What a worker process may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// CPU time of all threads; `None` for a process that serves until it is told to stop.
    pub(crate) cpu_s: Option<u64>,
    /// Private memory it may write. Reserved address space is free: a pool of guests reserves terabytes.
    pub(crate) memory_bytes: u64,
}

/// Why a process could not be confined. It must not go on.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A resource limit or process attribute.
    #[error("confine this process: {what}: {error}")]
    Limit {
        /// What was being set.
        what: &'static str,
        /// The kernel's answer.
        error: rustix::io::Errno,
    },
    /// Landlock, on a kernel that has it.
    #[error("confine this process with landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter of system calls.
    #[error("confine this process with a seccomp filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Seccomp(String),
}

/// System calls a worker may make whatever their arguments: memory, threads, signals, time, and reading and writing what it
/// was given.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_dup,
    // Memory. A memfd is memory too: instances of a guest share its first pages through one.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_membarrier,
    // Threads of this process.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Signals: traps of guests, and abort.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// Calls that exist on this architecture only.
#[cfg(target_arch = "x86_64")]
const ALLOWED_ARCH: &[libc::c_long] = &[libc::SYS_poll];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_ARCH: &[libc::c_long] = &[];

/// Confines this process for good. Call it while there is one thread: others would stay free.
///
/// # Errors
/// The kernel refuses. On a kernel without landlock the other walls stand alone.
pub(crate) fn confine(bounds: Bounds) -> Result<(), SandboxError> {
    limit("its end with its parent's", || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
    })?;
    limit("no core dumps", || {
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
    })?;
    limits(bounds)?;
    limit("no new privileges", || rustix::thread::set_no_new_privs(true))?;
    landlock()?;
    seccomp()
}

fn limit(what: &'static str, set: impl FnOnce() -> rustix::io::Result<()>) -> Result<(), SandboxError> {
    set().map_err(|error| SandboxError::Limit { what, error })
}

fn limits(bounds: Bounds) -> Result<(), SandboxError> {
    let set = |what, resource, most: u64| {
        let limits = Rlimit {
            current: Some(most),
            // One second of CPU time more: the first limit's signal has a name, the second's is KILL.
            maximum: Some(most + u64::from(resource == Resource::Cpu)),
        };
        limit(what, || rustix::process::setrlimit(resource, limits))
    };
    set("core dumps", Resource::Core, 0)?;
    set("open files", Resource::Nofile, 256)?;
    set("memory", Resource::Data, bounds.memory_bytes)?;
    if let Some(cpu_s) = bounds.cpu_s {
        set("CPU time", Resource::Cpu, cpu_s)?;
        set("written files", Resource::Fsize, 0)?;
    }
    Ok(())
}

/// No file, no TCP port, no process outside. Best effort: what the kernel does not know yet is left out.
fn landlock() -> Result<(), SandboxError> {
    let abi = ABI::V6;
    Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn seccomp() -> Result<(), SandboxError> {
    let failed = |error: &dyn std::fmt::Display| SandboxError::Seccomp(error.to_string());
    let install = |filter: Result<SeccompFilter, seccompiler::BackendError>| {
        let program: BpfProgram = filter
            .and_then(TryInto::try_into)
            .map_err(|error| failed(&error))?;
        seccompiler::apply_filter(&program).map_err(|error| failed(&error))
    };
    let arch = std::env::consts::ARCH
        .try_into()
        .map_err(|error| failed(&error))?;
    let errno = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    // The flags of clone3 lie in memory, where a filter does not look: libc falls back to clone.
    let clone3 = [(libc::SYS_clone3, Vec::new())].into();
    install(SeccompFilter::new(
        clone3,
        SeccompAction::Allow,
        errno(libc::ENOSYS),
        arch,
    ))?;
    let rules = rules().map_err(|error| failed(&error))?;
    install(SeccompFilter::new(
        rules,
        errno(libc::EPERM),
        SeccompAction::Allow,
        arch,
    ))
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED
        .iter()
        .chain(ALLOWED_ARCH)
        .map(|call| (*call, Vec::new()))
        .collect();
    let only = |argument, operator, value: u64| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)?;
        Ok::<_, seccompiler::BackendError>(vec![SeccompRule::new(vec![condition])?])
    };
    // To the second filter clone3 is allowed; of two refusals the first installed would be forgotten.
    rules.insert(libc::SYS_clone3, Vec::new());
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rules.insert(libc::SYS_clone, only(0, SeccompCmpOp::MaskedEq(thread), thread)?);
    let set_name = u64::from(libc::PR_SET_NAME.unsigned_abs());
    rules.insert(libc::SYS_prctl, only(0, SeccompCmpOp::Eq, set_name)?);
    // The calling thread's, to have it run behind all others: the host's threads may have the same user.
    let own = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    let idle = u64::from(libc::SCHED_IDLE.unsigned_abs());
    let idle = SeccompCondition::new(1, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, idle)?;
    rules.insert(
        libc::SYS_sched_setscheduler,
        vec![SeccompRule::new(vec![own, idle])?],
    );
    // Its own limits, to read them: it cannot raise them any more.
    rules.insert(libc::SYS_prlimit64, only(0, SeccompCmpOp::Eq, 0)?);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::process::Command;

    use super::*;
    use crate::standing;

    /// Both walls are around one thread and those it starts, so that a test can stand behind them.
    fn behind(wall: fn() -> Result<(), SandboxError>, check: fn()) {
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).expect("allowed");
            wall().expect("the kernel has it");
            check();
        });
        thread.join().expect("all checks hold");
    }

    #[test]
    fn no_file_socket_or_program_is_within_reach() {
        behind(seccomp, || {
            let denied = |what: &str, error: Option<std::io::Error>| {
                let error = error.unwrap_or_else(|| panic!("{what} was allowed"));
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}");
            };
            denied("reading", File::open("/etc/passwd").err());
            denied("writing", File::create("/tmp/galerne-sandbox-test").err());
            denied("listing", std::fs::read_dir("/").err());
            denied("a socket", TcpListener::bind("127.0.0.1:0").err());
            denied("a program", Command::new("/bin/true").spawn().err());
        });
    }

    #[test]
    fn a_thread_may_stand_back() {
        behind(seccomp, || {
            standing::may_stand_back();
            standing::stand_back();
            assert!(standing::stands_back());
        });
    }

    #[test]
    fn threads_and_memory_are_within_reach() {
        behind(seccomp, || {
            let sum = std::thread::spawn(|| {
                vec![1u8; 64 << 20]
                    .iter()
                    .map(|byte| u64::from(*byte))
                    .sum::<u64>()
            });
            assert_eq!(sum.join().expect("a thread"), 64 << 20);
        });
    }

    #[test]
    fn landlock_alone_denies_files_and_network() {
        behind(landlock, || {
            let opened = File::open("/etc/passwd").map(drop);
            // A kernel without landlock has only the other wall.
            if let Err(error) = opened {
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
                assert!(TcpListener::bind("127.0.0.1:0").is_err(), "a port was bound");
            } else {
                eprintln!("SKIPPED: this kernel has no landlock");
            }
        });
    }
}
