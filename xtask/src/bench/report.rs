//! The lines of a comparison and how they are shown: a table, Markdown, JSON lines.

use std::fmt::Write as _;

use serde_json::json;

use super::stats::{Sample, Summary};

/// Which of two figures is the better one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    Higher,
    Lower,
}

/// One comparison.
pub(super) struct Line {
    name: String,
    /// What the figures count, and whom `peer` is.
    unit: &'static str,
    peer_name: String,
    ours: Summary,
    peer: Summary,
    /// How many times better ours is, of the medians; and the spread of the pairs' ratios.
    ratio: f64,
    spread: Summary,
    target: f64,
}

impl Line {
    fn status(&self) -> &'static str {
        if self.ratio >= self.target { "ok" } else { "short" }
    }
}

/// All comparisons of a run.
#[derive(Default)]
pub(super) struct Report {
    lines: Vec<Line>,
}

/// What is compared.
pub(super) struct Compared<'a> {
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) peer_name: &'a str,
    pub(super) better: Better,
    /// How many times better ours is to be, at least.
    pub(super) target: f64,
}

impl Report {
    /// Adds a line and shows it, since a whole run takes long.
    pub(super) fn add(&mut self, compared: Compared<'_>, ours: &Sample, peer: &Sample) {
        let (above, below) = match compared.better {
            Better::Higher => (ours, peer),
            Better::Lower => (peer, ours),
        };
        let line = Line {
            name: compared.name,
            unit: compared.unit,
            peer_name: compared.peer_name.to_owned(),
            ours: ours.summary(),
            peer: peer.summary(),
            ratio: above.summary().median / below.summary().median,
            spread: above.over(below).summary(),
            target: compared.target,
        };
        eprintln!(
            "{}: ours {}, {} {}, ratio {:.2}, target {}, {}",
            line.name,
            number(line.ours.median),
            line.peer_name,
            number(line.peer.median),
            line.ratio,
            line.target,
            line.status()
        );
        self.lines.push(line);
    }

    /// A Markdown table, columns aligned for the terminal.
    pub(super) fn table(&self) -> String {
        let mut rows =
            vec![["name", "unit", "ours", "peer", "peer is", "ratio", "target", ""].map(str::to_owned)];
        rows.extend(self.lines.iter().map(|line| {
            [
                line.name.clone(),
                line.unit.to_owned(),
                summary(line.ours),
                summary(line.peer),
                line.peer_name.clone(),
                format!(
                    "{:.2} ({:.2} to {:.2})",
                    line.ratio, line.spread.min, line.spread.max
                ),
                line.target.to_string(),
                line.status().to_owned(),
            ]
        }));
        markdown(&rows)
    }

    /// One object per line: name, unit, ours, peer, `peer_name`, ratio, target, status.
    pub(super) fn json_lines(&self) -> String {
        let mut text = String::new();
        for line in &self.lines {
            let object = json!({
                "name": line.name,
                "unit": line.unit,
                "ours": line.ours.median,
                "peer": line.peer.median,
                "peer_name": line.peer_name,
                "ratio": line.ratio,
                "target": line.target,
                "status": line.status(),
            });
            let _ = writeln!(text, "{object}");
        }
        text
    }
}

fn summary(of: Summary) -> String {
    if of.min == of.max {
        return number(of.median);
    }
    format!("{} ({} to {})", number(of.median), number(of.min), number(of.max))
}

/// Three or four digits that matter.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        size if size >= 0.01 => format!("{value:.4}"),
        _ => format!("{value:.2e}"),
    }
}

/// A table whose first row is its head.
pub(super) fn markdown<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if index == 0 {
            for width in widths {
                let _ = write!(text, "|{}", "-".repeat(width + 2));
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(better: Better, target: f64) -> Report {
        let mut report = Report::default();
        let compared = Compared {
            name: "decode".to_owned(),
            unit: "tokens/s",
            peer_name: "peer",
            better,
            target,
        };
        report.add(
            compared,
            &Sample(vec![300.0, 340.0, 320.0]),
            &Sample(vec![160.0, 200.0, 150.0]),
        );
        report
    }

    #[test]
    fn a_ratio_says_how_many_times_better_whichever_way_better_is() {
        let line = &report(Better::Higher, 1.7).lines[0];
        assert_eq!((line.ratio, line.status()), (2.0, "ok"));
        assert_eq!((line.spread.min, line.spread.max), (1.7, 320.0 / 150.0));
        let line = &report(Better::Lower, 1.0).lines[0];
        assert_eq!((line.ratio, line.status()), (0.5, "short"));
    }

    #[test]
    fn json_lines_carry_the_medians_and_the_verdict() {
        let text = report(Better::Higher, 2.5).json_lines();
        let object: serde_json::Value = serde_json::from_str(text.trim_end()).expect("one object");
        assert_eq!(object["ours"], 320.0);
        assert_eq!(object["peer"], 160.0);
        assert_eq!(object["status"], "short");
    }

    #[test]
    fn the_table_has_a_row_per_line() {
        let table = report(Better::Higher, 1.7).table();
        assert_eq!(table.lines().count(), 3);
        assert!(table.contains("320 (300 to 340)"), "{table}");
    }
}
