//! The log of one deployment's guests: bounded, rate-limited, with nothing in it that could pass for another line.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use galerne_core::capability::{LogLine, LogTail};
use galerne_core::limits::CapabilityLimits;

/// The newest lines of one deployment, in memory.
pub struct GuestLog {
    lines_max: usize,
    per_second_max: u32,
    // A std Mutex: held for the push of one line.
    state: Mutex<State>,
}

struct State {
    lines: VecDeque<LogLine>,
    second: Instant,
    in_second: u32,
    dropped: u64,
    /// The number of the last line, dropped or not.
    last: u64,
}

impl std::fmt::Debug for GuestLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestLog")
            .field("lines_max", &self.lines_max)
            .finish_non_exhaustive()
    }
}

impl GuestLog {
    /// Without lines.
    #[must_use]
    pub fn new(limits: &CapabilityLimits) -> Self {
        Self {
            lines_max: limits.log_lines_kept_max,
            per_second_max: limits.log_lines_per_second_max,
            state: Mutex::new(State {
                lines: VecDeque::new(),
                second: Instant::now(),
                in_second: 0,
                dropped: 0,
                last: 0,
            }),
        }
    }

    /// The lines kept whose numbers are above this one.
    #[must_use]
    pub fn after(&self, number: u64) -> LogTail {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let first = state.lines.partition_point(|line| line.number <= number);
        LogTail {
            lines: state.lines.range(first..).cloned().collect(),
            last: state.last,
        }
    }

    /// Numbers a line, keeps it and says so, unless too many came within the second. The first line afterwards says how
    /// many were dropped.
    pub(crate) fn push(&self, now: Instant, mut line: LogLine) -> Option<LogLine> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(state.second) >= Duration::from_secs(1) {
            state.second = now;
            state.in_second = 0;
        }
        state.last += 1;
        line.number = state.last;
        if state.in_second >= self.per_second_max {
            state.dropped += 1;
            return None;
        }
        state.in_second += 1;
        let dropped = std::mem::take(&mut state.dropped);
        if dropped > 0 {
            line.text.push_str(&format!(
                " [{dropped} earlier lines of this deployment dropped: at most {} per second]",
                self.per_second_max
            ));
        }
        if self.lines_max > 0 {
            if state.lines.len() >= self.lines_max {
                state.lines.pop_front();
            }
            state.lines.push_back(line.clone());
        }
        Some(line)
    }
}

/// The time of a line.
pub(crate) fn time_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// One line of at most `bytes_max` bytes that a terminal shows as it is written.
pub(crate) fn escaped(message: &str, bytes_max: usize) -> String {
    let mut line = String::new();
    for character in message.chars() {
        let before = line.len();
        match character {
            '\\' => line.push_str("\\\\"),
            shown if shown.is_control() || is_format(shown) => line.extend(shown.escape_default()),
            shown => line.push(shown),
        }
        if line.len() > bytes_max {
            line.truncate(before);
            line.push('…');
            break;
        }
    }
    line
}

/// Characters without a look of their own that change how others look: directions, joiners, separators, tags.
fn is_format(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use galerne_core::capability::LogLevel;

    use super::*;

    fn line(number: u64, text: &str) -> LogLine {
        LogLine {
            number,
            time_ms: 0,
            level: LogLevel::Info,
            guest: "g".to_owned(),
            request: "r".to_owned(),
            text: text.to_owned(),
        }
    }

    fn log(kept: usize, per_second: u32) -> GuestLog {
        GuestLog::new(&CapabilityLimits {
            log_lines_kept_max: kept,
            log_lines_per_second_max: per_second,
            ..CapabilityLimits::default()
        })
    }

    #[test]
    fn a_line_is_one_line_and_says_what_it_is() {
        assert_eq!(
            escaped("a\nERROR b\u{1b}[31m\r\0", 100),
            "a\\nERROR b\\u{1b}[31m\\r\\u{0}"
        );
        assert_eq!(
            escaped("\u{202e}txet\u{2028}\u{9b}", 100),
            "\\u{202e}txet\\u{2028}\\u{9b}"
        );
        assert_eq!(escaped("C:\\n é 日本", 100), "C:\\\\n é 日本");
        assert_eq!(escaped("ééé", 4), "éé…");
        assert_eq!(escaped("a\n\n", 4), "a\\n…", "no escape is cut in two");
    }

    #[test]
    fn the_newest_lines_are_kept() {
        let log = log(2, 100);
        let now = Instant::now();
        for text in ["a", "b", "c"] {
            assert!(log.push(now, line(0, text)).is_some());
        }
        let tail = |number| (log.after(number).lines, log.after(number).last);
        assert_eq!(tail(0), (vec![line(2, "b"), line(3, "c")], 3));
        assert_eq!(tail(2), (vec![line(3, "c")], 3));
        assert_eq!(tail(3), (vec![], 3));
        assert_eq!(tail(9), (vec![], 3), "a number of an earlier start");
    }

    #[test]
    fn too_many_lines_in_a_second_are_dropped_and_counted() {
        let log = log(10, 2);
        let now = Instant::now();
        let written = (0..5).filter(|_| log.push(now, line(0, "a")).is_some()).count();
        let tail = log.after(0);
        assert_eq!((written, tail.lines.len(), tail.last), (2, 2, 5));
        let later = log
            .push(now + Duration::from_secs(1), line(0, "b"))
            .expect("a new second");
        assert_eq!(later.number, 6, "what was dropped was counted");
        assert_eq!(
            later.text,
            "b [3 earlier lines of this deployment dropped: at most 2 per second]"
        );
    }
}
