//! From bytes of code to an AMX instruction: the VEX prefix of three bytes, opcode, ModRM, SIB and displacement.

use super::tiles::Sign;

/// An instruction, its operands by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instruction {
    Configure(Address),
    Release,
    Zero(usize),
    Load(usize, Address),
    Store(Address, usize),
    DotBytes {
        to: usize,
        from: [usize; 2],
        signs: [Sign; 2],
    },
    DotBf16 {
        to: usize,
        from: [usize; 2],
    },
}

/// A memory operand. Registers are numbered as in instructions: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) base: Base,
    /// Register and the power of two it is multiplied with. Of a tile it is the distance of rows.
    pub(crate) index: Option<(usize, u32)>,
    pub(crate) displacement: i32,
}

/// What an address begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Base {
    Register(usize),
    /// The end of the instruction.
    Next,
    Nothing,
}

/// Bytes of code, read one after the other: no further than the instruction goes.
struct Code {
    at: *const u8,
    taken: usize,
}

impl Code {
    unsafe fn byte(&mut self) -> u8 {
        // SAFETY: by the contract of `decode`.
        let byte = unsafe { self.at.add(self.taken).read() };
        self.taken += 1;
        byte
    }

    unsafe fn displacement(&mut self) -> i32 {
        // SAFETY: by the contract of `decode`.
        i32::from_le_bytes(std::array::from_fn(|_| unsafe { self.byte() }))
    }
}

/// The prefix's fields, inverted bits set right.
struct Vex {
    r: usize,
    x: usize,
    b: usize,
    v: usize,
    prefix: u8,
}

/// The AMX instruction at `code` and its length; `None` for any other.
///
/// # Safety
/// `code` points to a whole instruction.
pub(crate) unsafe fn decode(code: *const u8) -> Option<(Instruction, usize)> {
    let mut code = Code { at: code, taken: 0 };
    // SAFETY: each byte is read only if those before it say that the instruction goes on.
    unsafe {
        let vex = vex(&mut code)?;
        let opcode = code.byte();
        if !matches!(opcode, 0x49 | 0x4b | 0x5c | 0x5e) {
            return None;
        }
        let modrm = code.byte();
        let reg = usize::from(modrm >> 3 & 7) + vex.r;
        let instruction = if modrm >> 6 == 3 {
            registers(&vex, opcode, reg, usize::from(modrm & 7) + vex.b)?
        } else {
            memory(&vex, opcode, reg, modrm, &mut code)?
        };
        Some((instruction, code.taken))
    }
}

/// The prefix, if its map is 0F 38, its vectors are of 128 bits and W is 0.
unsafe fn vex(code: &mut Code) -> Option<Vex> {
    // SAFETY: as in `decode`.
    unsafe {
        if code.byte() != 0xc4 {
            return None;
        }
        let first = code.byte();
        if first & 0x1f != 2 {
            return None;
        }
        let second = code.byte();
        if second & 0x84 != 0 {
            return None;
        }
        let bit = |bit: u8| usize::from(!first >> bit & 1) * 8;
        Some(Vex {
            r: bit(7),
            x: bit(6),
            b: bit(5),
            v: usize::from(!second >> 3 & 15),
            prefix: second & 3,
        })
    }
}

/// Prefixes as VEX numbers them.
const NONE: u8 = 0;
const P66: u8 = 1;
const PF3: u8 = 2;
const PF2: u8 = 3;

fn registers(vex: &Vex, opcode: u8, reg: usize, rm: usize) -> Option<Instruction> {
    use Sign::{Signed, Unsigned};
    let from = [rm, vex.v];
    let tiles = reg < 8 && rm < 8;
    let bytes = |signs| {
        let tiles = tiles && vex.v < 8;
        tiles.then_some(Instruction::DotBytes { to: reg, from, signs })
    };
    match (opcode, vex.prefix) {
        (0x49, NONE) if reg == 0 && rm == 0 && vex.v == 0 => Some(Instruction::Release),
        (0x49, PF2) if tiles && rm == 0 && vex.v == 0 => Some(Instruction::Zero(reg)),
        (0x5e, PF2) => bytes([Signed, Signed]),
        (0x5e, PF3) => bytes([Signed, Unsigned]),
        (0x5e, P66) => bytes([Unsigned, Signed]),
        (0x5e, NONE) => bytes([Unsigned, Unsigned]),
        (0x5c, PF3) if tiles && vex.v < 8 => Some(Instruction::DotBf16 { to: reg, from }),
        _ => None,
    }
}

unsafe fn memory(vex: &Vex, opcode: u8, reg: usize, modrm: u8, code: &mut Code) -> Option<Instruction> {
    let tile = opcode == 0x4b && reg < 8 && modrm & 7 == 4;
    if vex.v != 0 || !(tile || opcode == 0x49 && reg == 0 && vex.prefix == NONE) {
        return None;
    }
    // SAFETY: as in `decode`.
    let address = unsafe { address(vex, modrm, code) };
    match (opcode, vex.prefix) {
        (0x49, NONE) => Some(Instruction::Configure(address)),
        (0x4b, PF2 | P66) => Some(Instruction::Load(reg, address)),
        (0x4b, PF3) => Some(Instruction::Store(address, reg)),
        _ => None,
    }
}

unsafe fn address(vex: &Vex, modrm: u8, code: &mut Code) -> Address {
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let (mut base, mut index) = (Base::Register(usize::from(rm) + vex.b), None);
    let mut low = rm;
    // SAFETY: as in `decode`.
    unsafe {
        if rm == 4 {
            let sib = code.byte();
            let register = usize::from(sib >> 3 & 7) + vex.x;
            index = (register != 4).then_some((register, u32::from(sib >> 6)));
            low = sib & 7;
            base = Base::Register(usize::from(low) + vex.b);
        }
        let displacement = match (mode, low) {
            (0, 5) => {
                base = if rm == 4 { Base::Nothing } else { Base::Next };
                code.displacement()
            }
            (0, _) => 0,
            (1, _) => i32::from(code.byte().cast_signed()),
            _ => code.displacement(),
        };
        Address {
            base,
            index,
            displacement,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: &[u8], expected: Option<Instruction>) {
        let mut padded = code.to_vec();
        padded.resize(16, 0x90);
        // SAFETY: longer than any instruction.
        let got = unsafe { decode(padded.as_ptr()) };
        assert_eq!(
            got,
            expected.map(|instruction| (instruction, code.len())),
            "{code:02x?}"
        );
    }

    fn at(base: usize, index: Option<(usize, u32)>, displacement: i32) -> Address {
        Address {
            base: Base::Register(base),
            index,
            displacement,
        }
    }

    /// Encodings as LLVM's and GNU's assemblers' own tests list them.
    #[test]
    fn instructions_are_read_as_assemblers_write_them() {
        use Instruction::{Configure, DotBf16, DotBytes, Load, Release, Store, Zero};
        use Sign::{Signed, Unsigned};
        check(&[0xc4, 0xe2, 0x78, 0x49, 0xc0], Some(Release));
        check(&[0xc4, 0xe2, 0x7b, 0x49, 0xf0], Some(Zero(6)));
        // ldtilecfg [rcx], [rsp + 8], [r9 + 0x100], [rip + 4]
        check(&[0xc4, 0xe2, 0x78, 0x49, 0x01], Some(Configure(at(1, None, 0))));
        check(
            &[0xc4, 0xe2, 0x78, 0x49, 0x44, 0x24, 0x08],
            Some(Configure(at(4, None, 8))),
        );
        check(
            &[0xc4, 0xc2, 0x78, 0x49, 0x81, 0x00, 0x01, 0x00, 0x00],
            Some(Configure(at(9, None, 256))),
        );
        let next = Address {
            base: Base::Next,
            index: None,
            displacement: 4,
        };
        check(&[0xc4, 0xe2, 0x78, 0x49, 0x05, 4, 0, 0, 0], Some(Configure(next)));
        // tileloadd tmm6, [rbp + 8 * r14 + 0x10000000]; tileloaddt1 tmm3, [r8 + rbx]; tilestored [r9 - 32], tmm3
        check(
            &[0xc4, 0xa2, 0x7b, 0x4b, 0xb4, 0xf5, 0x00, 0x00, 0x00, 0x10],
            Some(Load(6, at(5, Some((14, 3)), 0x1000_0000))),
        );
        check(
            &[0xc4, 0xc2, 0x79, 0x4b, 0x1c, 0x18],
            Some(Load(3, at(8, Some((3, 0)), 0))),
        );
        check(
            &[0xc4, 0xc2, 0x7a, 0x4b, 0x5c, 0x61, 0xe0],
            Some(Store(at(9, None, -32), 3)),
        );
        for (prefix, signs) in [
            (0x5b, [Signed, Signed]),
            (0x5a, [Signed, Unsigned]),
            (0x59, [Unsigned, Signed]),
            (0x58, [Unsigned, Unsigned]),
        ] {
            // tmm6, tmm5, tmm4
            let dot = DotBytes {
                to: 6,
                from: [5, 4],
                signs,
            };
            check(&[0xc4, 0xe2, prefix, 0x5e, 0xf5], Some(dot));
        }
        let dot = DotBf16 { to: 3, from: [2, 1] };
        check(&[0xc4, 0xe2, 0x72, 0x5c, 0xda], Some(dot));
    }

    #[test]
    fn what_is_not_amx_is_left_alone() {
        // ud2; vpdpbusd xmm; a load without SIB; tilezero with a register that is none; opcode of another map
        check(&[0x0f, 0x0b], None);
        check(&[0xc4, 0xe2, 0x59, 0x50, 0xd5], None);
        check(&[0xc4, 0xe2, 0x7b, 0x4b, 0x01], None);
        check(&[0xc4, 0x62, 0x7b, 0x49, 0xf0], None);
        check(&[0xc4, 0xe1, 0x7b, 0x49, 0xf0], None);
    }
}
