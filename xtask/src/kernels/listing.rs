//! What the CUDA tools print: resources of kernels, their instructions, entry points of PTX; and our table of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::compile::{Compiled, Kernel};

/// From `ptxas -v`.
pub(super) fn resources(messages: &str) -> Result<BTreeMap<String, Kernel>> {
    let mut kernels: BTreeMap<String, Kernel> = BTreeMap::new();
    // Whose lines these are: functions that are not entry points have some too.
    let mut entry: Option<String> = None;
    let mut current: Option<String> = None;
    for line in messages.lines() {
        let line = line
            .trim_start_matches("ptxas info")
            .trim_start_matches([' ', ':']);
        if let Some(rest) = line.strip_prefix("Compiling entry function '") {
            entry = rest.split('\'').next().map(str::to_owned);
        } else if let Some(name) = line.strip_prefix("Function properties for ") {
            current = Some(name.trim().to_owned()).filter(|name| entry.as_ref() == Some(name));
        } else if let (Some(name), true) = (&current, line.contains("bytes stack frame")) {
            let kernel = kernels.entry(name.clone()).or_default();
            kernel.stack_bytes = number_before(line, " bytes stack frame").unwrap_or(0);
            kernel.spill_bytes = number_before(line, " bytes spill stores").unwrap_or(0)
                + number_before(line, " bytes spill loads").unwrap_or(0);
        } else if let (Some(name), true) = (&entry, line.starts_with("Used ")) {
            let kernel = kernels.entry(name.clone()).or_default();
            kernel.registers =
                number_before(line, " registers").with_context(|| format!("no registers in {line:?}"))?;
            kernel.static_shared_bytes = number_before(line, " bytes smem").unwrap_or(0);
        }
    }
    Ok(kernels)
}

fn number_before(line: &str, unit: &str) -> Option<u32> {
    let before = &line[..line.find(unit)?];
    before.rsplit([' ', ',']).next()?.parse().ok()
}

/// From `cuobjdump -sass`, for kernels that are known already.
pub(super) fn add_instructions(sass: &str, kernels: &mut BTreeMap<String, Kernel>) -> Result<()> {
    let mut current = None;
    for line in sass.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("Function : ") {
            current = kernels.get_mut(name);
        } else if let (Some(kernel), Some(opcode)) = (&mut current, opcode(line)) {
            *kernel.instructions.entry(opcode.to_owned()).or_default() += 1;
        }
    }
    let bare = kernels.iter().find(|(_, kernel)| kernel.instructions.is_empty());
    bare.map_or(Ok(()), |(name, _)| {
        Err(anyhow::anyhow!("cuobjdump shows no instructions of {name}"))
    })
}

/// `/*0010*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* … */`: the word behind the address and the predicate.
fn opcode(line: &str) -> Option<&str> {
    let (_, instruction) = line.strip_prefix("/*")?.split_once("*/")?;
    let mut words = instruction
        .trim_start_matches([' ', '\t', '{'])
        .split_whitespace();
    let first = words.next()?;
    let opcode = if first.starts_with('@') {
        words.next()?
    } else {
        first
    };
    let opcode = opcode.trim_end_matches(';');
    opcode
        .starts_with(|c: char| c.is_ascii_uppercase())
        .then_some(opcode)
}

/// Entry points of PTX.
pub(super) fn ptx_kernels(ptx: &str) -> BTreeMap<String, Kernel> {
    let entries = ptx.lines().filter_map(|line| line.split_once(".entry "));
    entries
        .map(|(_, rest)| {
            let name = rest.split(['(', ' ']).next().unwrap_or(rest);
            (name.to_owned(), Kernel::default())
        })
        .collect()
}

/// A line for each kernel that was compiled to machine code.
pub(super) fn table(compiled: &[Compiled]) -> String {
    let mut table = format!(
        "{:<44} {:<8} {:>9} {:>6} {:>6} {:>12}\n",
        "kernel", "arch", "registers", "spills", "stack", "instructions"
    );
    for module in compiled.iter().filter(|module| module.target.starts_with("sm_")) {
        for (name, kernel) in &module.kernels {
            let instructions: u32 = kernel.instructions.values().sum();
            let (registers, spills, stack) = (kernel.registers, kernel.spill_bytes, kernel.stack_bytes);
            writeln!(
                table,
                "{name:<44} {:<8} {registers:>9} {spills:>6} {stack:>6} {instructions:>12}",
                module.target
            )
            .expect("writing to a string");
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGES: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    96 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 21 registers, used 1 barriers, 96 bytes cumulative stack size, 128 bytes smem, 352 bytes cmem[0]
ptxas info    : Compile time = 36.268 ms
ptxas info    : Function properties for helper
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'norm' for 'sm_90a'
ptxas info    : Function properties for norm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
";

    #[test]
    fn reads_resources_of_kernels_and_not_of_what_they_call() {
        let kernels = resources(MESSAGES).expect("messages as ptxas has them");
        let attend = Kernel {
            registers: 21,
            spill_bytes: 28,
            stack_bytes: 96,
            static_shared_bytes: 128,
            ..Kernel::default()
        };
        let norm = Kernel {
            registers: 7,
            ..Kernel::default()
        };
        assert_eq!(
            kernels,
            [("attend".to_owned(), attend), ("norm".to_owned(), norm)].into()
        );
    }

    #[test]
    fn counts_instructions() {
        let sass = "
\tcode for sm_90a
\t\tFunction : norm
\t.headerflags\t@\"EF_CUDA_ACCELERATORS EF_CUDA_SM90\"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                               /* 0x00000a00ff017b82 */
                                                                                        /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;                     /* 0x000000030f00720c */
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;                     /* 0x000000030f00720c */
        /*0030*/                   EXIT ;                                               /* 0x000000030f00720c */
\t\t..........
";
        let mut kernels = BTreeMap::from([("norm".to_owned(), Kernel::default())]);
        add_instructions(sass, &mut kernels).expect("a listing as cuobjdump has it");
        let counts: Vec<(&str, u32)> = kernels["norm"]
            .instructions
            .iter()
            .map(|(name, count)| (&**name, *count))
            .collect();
        assert_eq!(counts, [("EXIT", 1), ("LDC", 1), ("LDG.E.128", 2)]);
        kernels.insert("other".to_owned(), Kernel::default());
        assert!(add_instructions(sass, &mut kernels).is_err());
    }

    #[test]
    fn finds_entry_points_of_ptx() {
        let kernels = ptx_kernels(
            ".version 9.0\n.visible .entry norm_rms(\n\t.param .align 8 .b8 p[88]\n)\n.entry other(\n",
        );
        assert_eq!(kernels.into_keys().collect::<Vec<_>>(), ["norm_rms", "other"]);
    }
}
