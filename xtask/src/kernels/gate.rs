//! What must hold of compiled kernels: `kernels/cuda/gate.toml` against what the compiler and the disassembler say.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::compile::{Compiled, Kernel, TARGETS};
use super::kernels_dir;

/// `gate.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gate {
    default: Limits,
    #[serde(default, rename = "kernel")]
    rules: Vec<Rule>,
}

/// What holds where a rule says nothing, most per thread; the instructions are wanted of every kernel.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    registers: u32,
    spill_bytes: u32,
    stack_bytes: u32,
    instructions: Vec<String>,
}

/// The first rule whose pattern a kernel's name matches is its only one.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    name: String,
    registers: Option<u32>,
    spill_bytes: Option<u32>,
    stack_bytes: Option<u32>,
    #[serde(default)]
    instructions: Vec<String>,
    #[serde(default)]
    sm_90a: Vec<String>,
    #[serde(default)]
    sm_100a: Vec<String>,
}

/// Checks all; if the modules are all there are, every rule must be of use.
///
/// # Errors
/// With every finding.
pub(super) fn check(compiled: &[Compiled], are_all: bool) -> Result<()> {
    let file = kernels_dir().join("gate.toml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let gate: Gate = toml::from_str(&text).with_context(|| format!("parse {}", file.display()))?;
    let findings = gate.findings(compiled, are_all);
    ensure!(
        findings.is_empty(),
        "compiled CUDA kernels are not what kernels/cuda/gate.toml says:\n  {}",
        findings.join("\n  ")
    );
    let kernels = machine_code(compiled).count();
    eprintln!("CUDA kernels: {kernels} pass the gate");
    Ok(())
}

/// Every kernel for every architecture.
fn machine_code(compiled: &[Compiled]) -> impl Iterator<Item = (&str, &str, &Kernel)> {
    let modules = compiled.iter().filter(|module| module.target.starts_with("sm_"));
    modules.flat_map(|module| {
        let kernels = module.kernels.iter();
        kernels.map(|(name, kernel)| (module.target.as_str(), name.as_str(), kernel))
    })
}

impl Gate {
    fn findings(&self, compiled: &[Compiled], are_all: bool) -> Vec<String> {
        let mut findings = Vec::new();
        let mut used = BTreeSet::new();
        for (target, name, kernel) in machine_code(compiled) {
            let rule = self.rules.iter().position(|rule| matches(&rule.name, name));
            used.extend(rule);
            let none = Rule::default();
            let rule = rule.map_or(&none, |index| &self.rules[index]);
            self.check_kernel(rule, (target, name), kernel, &mut findings);
        }
        for (index, rule) in self.rules.iter().enumerate().filter(|_| are_all) {
            if !used.contains(&index) {
                findings.push(format!(
                    "gate.toml: expected {:?} to name a kernel that no line above it names, got none",
                    rule.name
                ));
            }
        }
        findings
    }

    fn check_kernel(
        &self,
        rule: &Rule,
        (target, name): (&str, &str),
        kernel: &Kernel,
        findings: &mut Vec<String>,
    ) {
        let default = &self.default;
        for (what, limit, got) in [
            (
                "registers",
                rule.registers.unwrap_or(default.registers),
                kernel.registers,
            ),
            (
                "bytes of spills",
                rule.spill_bytes.unwrap_or(default.spill_bytes),
                kernel.spill_bytes,
            ),
            (
                "bytes of stack",
                rule.stack_bytes.unwrap_or(default.stack_bytes),
                kernel.stack_bytes,
            ),
            ("bytes of static shared memory", 0, kernel.static_shared_bytes),
        ] {
            if got > limit {
                findings.push(format!(
                    "{name} for {target}: expected at most {limit} {what}, got {got}"
                ));
            }
        }
        let of_target = [&rule.sm_90a, &rule.sm_100a];
        let of_target = TARGETS
            .iter()
            .zip(of_target)
            .filter(|(known, _)| known.name == target);
        let common = default.instructions.iter().chain(&rule.instructions);
        let expected = common.chain(of_target.flat_map(|(_, expected)| expected));
        for prefix in expected {
            if !kernel
                .instructions
                .keys()
                .any(|opcode| opcode.starts_with(prefix.as_str()))
            {
                findings.push(format!(
                    "{name} for {target}: expected an instruction {prefix}…, got none; there are {}",
                    alike(prefix, kernel)
                ));
            }
        }
    }
}

/// Instructions of the same kind, to see what came instead; all if there are none.
fn alike(prefix: &str, kernel: &Kernel) -> String {
    let family = prefix.split('.').next().unwrap_or(prefix);
    let all = || kernel.instructions.keys().map(String::as_str);
    let same: Vec<&str> = all().filter(|opcode| opcode.starts_with(family)).collect();
    if same.is_empty() {
        all().collect::<Vec<_>>().join(" ")
    } else {
        same.join(" ")
    }
}

/// A `*` in a pattern stands for anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((begin, rest)) => name.strip_prefix(begin).is_some_and(|name| {
            (0..=name.len()).any(|at| name.is_char_boundary(at) && matches(rest, &name[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const GATE: &str = r#"
        [default]
        registers = 64
        spill_bytes = 0
        stack_bytes = 0
        instructions = ["ACQBULK"]

        [[kernel]]
        name = "linear_bf16_*"
        registers = 128
        instructions = ["HMMA"]
        sm_90a = ["LDGSTS.E.BYPASS.128"]
    "#;

    fn findings(name: &str, kernel: Kernel, target: &str) -> Vec<String> {
        let gate: Gate = toml::from_str(GATE).expect("a gate");
        let module = Compiled {
            module: "linear".to_owned(),
            target: target.to_owned(),
            kernels: BTreeMap::from([(name.to_owned(), kernel)]),
            bytes: 0,
            code: vec![],
        };
        gate.findings(&[module], false)
    }

    fn kernel(registers: u32, instructions: &[&str]) -> Kernel {
        Kernel {
            registers,
            instructions: ["ACQBULK"]
                .iter()
                .chain(instructions)
                .map(|name| ((*name).to_owned(), 1))
                .collect(),
            ..Kernel::default()
        }
    }

    #[test]
    fn a_kernel_within_its_limits_passes() {
        let full = ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128"];
        assert_eq!(findings("linear_bf16_m8", kernel(128, &full), "sm_90a"), [""; 0]);
        assert_eq!(
            findings("linear_bf16_m8", kernel(128, &full[..1]), "sm_100a"),
            [""; 0]
        );
        assert_eq!(findings("other", kernel(64, &[]), "sm_90a"), [""; 0]);
        assert_eq!(findings("other", kernel(255, &[]), "compute_90"), [""; 0]);
    }

    #[test]
    fn a_finding_says_kernel_expected_and_got() {
        assert_eq!(
            findings("other", kernel(65, &[]), "sm_90a"),
            ["other for sm_90a: expected at most 64 registers, got 65"]
        );
        assert_eq!(
            findings(
                "linear_bf16_m8",
                kernel(1, &["HMMA.16816.F32", "LDGSTS.E", "EXIT"]),
                "sm_90a"
            ),
            [
                "linear_bf16_m8 for sm_90a: expected an instruction LDGSTS.E.BYPASS.128…, got none; there are LDGSTS.E"
            ]
        );
        let spilling = Kernel {
            spill_bytes: 4,
            stack_bytes: 8,
            static_shared_bytes: 16,
            ..kernel(1, &[])
        };
        assert_eq!(findings("other", spilling, "sm_100a").len(), 3);
    }

    #[test]
    fn every_kernel_wants_the_common_instructions() {
        let bare = Kernel {
            instructions: BTreeMap::from([("EXIT".to_owned(), 1)]),
            ..Kernel::default()
        };
        assert_eq!(
            findings("other", bare, "sm_90a"),
            ["other for sm_90a: expected an instruction ACQBULK…, got none; there are EXIT"]
        );
    }

    #[test]
    fn a_rule_without_a_kernel_is_a_finding() {
        let gate: Gate = toml::from_str(GATE).expect("a gate");
        assert_eq!(gate.findings(&[], true).len(), 1);
    }

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("norm_*", "norm_rms", true),
            ("norm_*", "norm", false),
            ("*_f32", "linear_f32", true),
            ("linear_*_m8*", "linear_bf16_m8", true),
            ("linear_*_m8*", "linear_bf16_m16", false),
            ("norm", "norm_rms", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
