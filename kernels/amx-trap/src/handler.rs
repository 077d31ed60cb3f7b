//! The signal handler: finds the instruction and its operands, computes it on the thread's tiles, goes on behind it.

use std::cell::UnsafeCell;
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use libc::{c_int, c_void, greg_t, siginfo_t, ucontext_t};

use super::decode::{Address, Base, Instruction, decode};
use super::tiles::{CONFIG_BYTES, Fault, Tiles};

thread_local! {
    // Constant and never dropped, so that the handler reaches it without allocating.
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(Tiles::new()) };
}

/// Who had the signal before; set once the handler is in place, or nothing if that failed.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

pub(crate) fn install() -> bool {
    let set = || {
        // SAFETY: an all-zero action is a valid one; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let mut before: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigill as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO;
            (libc::sigaction(libc::SIGILL, &raw const action, &raw mut before) == 0).then_some(before)
        }
    };
    BEFORE.get_or_init(set).is_some()
}

extern "C" fn on_sigill(_signal: c_int, _info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the interrupted thread's context; SIGILL comes from the instruction at its RIP, which is
    // whole since it was executed.
    unsafe {
        let context = &mut *context.cast::<ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as *const u8;
        let Some((instruction, length)) = decode(rip) else {
            pass_on();
            return;
        };
        let next = rip.add(length) as greg_t;
        // The thread itself is interrupted in an instruction, not in this function: nobody else holds its tiles.
        let done = TILES.with(|tiles| execute(&mut *tiles.get(), instruction, registers, next));
        if let Err(fault) = done {
            refuse(&fault);
        }
        super::EXECUTED.fetch_add(1, Ordering::Relaxed);
        registers[libc::REG_RIP as usize] = next;
    }
}

/// Gives the signal back: the instruction is executed again and its signal then goes where it went before.
fn pass_on() {
    if let Some(Some(before)) = BEFORE.get() {
        // SAFETY: an action that the system gave us.
        unsafe { libc::sigaction(libc::SIGILL, before, std::ptr::null_mut()) };
    }
}

fn refuse(fault: &Fault) -> ! {
    let mut text = [0_u8; 512];
    let mut left = text.as_mut_slice();
    // What does not fit is cut off.
    let _ = writeln!(left, "amx-trap: {fault}");
    let unused = left.len();
    let length = text.len() - unused;
    // SAFETY: the array is that long; nothing that other threads hold is needed.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length);
        libc::abort()
    }
}

/// # Safety
/// `registers` and `next` are those of a thread that executes the instruction, so its operands are its own to use.
unsafe fn execute(
    tiles: &mut Tiles,
    instruction: Instruction,
    registers: &[greg_t],
    next: greg_t,
) -> Result<(), Fault> {
    // SAFETY: as hardware, it touches what the program says.
    unsafe {
        match instruction {
            Instruction::Configure(address) => {
                let (start, distance) = resolve(address, registers, next);
                tiles.configure(&*((start + distance) as *const [u8; CONFIG_BYTES]))
            }
            Instruction::Release => {
                tiles.release();
                Ok(())
            }
            Instruction::Zero(tile) => tiles.zero(tile),
            Instruction::Load(tile, address) => {
                let (start, distance) = resolve(address, registers, next);
                tiles.load(tile, |row| (start + row as greg_t * distance) as *const u8)
            }
            Instruction::Store(address, tile) => {
                let (start, distance) = resolve(address, registers, next);
                tiles.store(tile, |row| (start + row as greg_t * distance) as *mut u8)
            }
            Instruction::DotBytes { to, from, signs } => tiles.dot_bytes(to, from, signs),
            Instruction::DotBf16 { to, from } => tiles.dot_bf16(to, from),
        }
    }
}

/// Where an operand starts without its index, and its scaled index.
fn resolve(address: Address, registers: &[greg_t], next: greg_t) -> (greg_t, greg_t) {
    let base = match address.base {
        Base::Register(number) => register(registers, number),
        Base::Next => next,
        Base::Nothing => 0,
    };
    let index = address
        .index
        .map_or(0, |(number, scale)| register(registers, number) << scale);
    (base.wrapping_add(address.displacement.into()), index)
}

/// The register that instructions number so.
fn register(registers: &[greg_t], number: usize) -> greg_t {
    const PLACES: [c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    registers[PLACES[number] as usize]
}
