//! The conformance suite, all of it: a case that fails does not end it.

use anyhow::Result;
use galerne_kernels::conformance::cases;
use galerne_kernels::device::{Device, Precision};

use super::Figure;

pub(super) fn run(device: &dyn Device, precision: Precision) -> Result<()> {
    for case in cases() {
        let failure = case.run(device, precision).err();
        Figure {
            name: format!("conformance {precision:?}: {}", case.name),
            passed: Some(failure.is_none()),
            note: failure.map(|error| error.to_string()),
            ..Figure::default()
        }
        .print()?;
    }
    Ok(())
}
