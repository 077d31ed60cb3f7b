//! Incremental parser of server-sent events (WHATWG HTML, 9.2). Knows no HTTP and does no I/O.

use std::collections::VecDeque;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SseEvent {
    /// The last `id:` that the stream has carried so far.
    pub id: Option<String>,
    /// The `event:` name, if it has one.
    pub event: Option<String>,
    /// All `data:` lines, joined by line feeds.
    pub data: String,
}

/// Bytes that are no event stream.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SseError {
    /// One event is longer than a client should hold.
    #[error("event stream: one event exceeds {limit_bytes} bytes")]
    TooLong {
        /// The bound.
        limit_bytes: usize,
    },
    /// A line is not UTF-8.
    #[error("event stream: a line is not UTF-8")]
    NotUtf8,
}

/// Takes bytes split anywhere, gives whole events.
#[derive(Debug)]
pub struct SseParser {
    line: Vec<u8>,
    after_cr: bool,
    first_line: bool,
    event: Option<String>,
    data: Option<String>,
    id: Option<String>,
    ready: VecDeque<SseEvent>,
    event_bytes_max: usize,
}

impl SseParser {
    /// A parser that refuses events of more than `event_bytes_max` bytes.
    #[must_use]
    pub fn new(event_bytes_max: usize) -> Self {
        Self {
            line: Vec::new(),
            after_cr: false,
            first_line: true,
            event: None,
            data: None,
            id: None,
            ready: VecDeque::new(),
            event_bytes_max,
        }
    }

    /// Feeds bytes as they came.
    ///
    /// # Errors
    /// When an event is too long or not UTF-8; the parser is of no use afterwards.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        for &byte in bytes {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\n' | b'\r' => self.end_line()?,
                _ => {
                    if self.line.len() + self.data.as_ref().map_or(0, String::len) >= self.event_bytes_max {
                        return Err(SseError::TooLong {
                            limit_bytes: self.event_bytes_max,
                        });
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    /// The next whole event, if one is there. An event without its empty line at the end of a stream never is one.
    pub fn next_event(&mut self) -> Option<SseEvent> {
        self.ready.pop_front()
    }

    fn end_line(&mut self) -> Result<(), SseError> {
        let line = String::from_utf8(std::mem::take(&mut self.line)).map_err(|_| SseError::NotUtf8)?;
        let line = match std::mem::take(&mut self.first_line) {
            true => line.strip_prefix('\u{feff}').unwrap_or(&line),
            false => &line,
        };
        if line.is_empty() {
            self.dispatch();
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => self.append(value)?,
            "event" => self.event = Some(value.to_owned()),
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            // `retry`, comments (an empty field name) and unknown fields.
            _ => {}
        }
        Ok(())
    }

    fn append(&mut self, value: &str) -> Result<(), SseError> {
        match &mut self.data {
            Some(data) => {
                // Empty data lines have no bytes that `push` would have counted.
                if data.len() >= self.event_bytes_max {
                    return Err(SseError::TooLong {
                        limit_bytes: self.event_bytes_max,
                    });
                }
                data.push('\n');
                data.push_str(value);
            }
            None => self.data = Some(value.to_owned()),
        }
        Ok(())
    }

    fn dispatch(&mut self) {
        let event = self.event.take();
        if let Some(data) = self.data.take() {
            self.ready.push_back(SseEvent {
                id: self.id.clone(),
                event,
                data,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: Option<&str>, name: Option<&str>, data: &str) -> SseEvent {
        SseEvent {
            id: id.map(str::to_owned),
            event: name.map(str::to_owned),
            data: data.to_owned(),
        }
    }

    fn parsed(pieces: &[&[u8]]) -> Vec<SseEvent> {
        let mut parser = SseParser::new(1024);
        for piece in pieces {
            parser.push(piece).expect("parses");
        }
        std::iter::from_fn(|| parser.next_event()).collect()
    }

    fn check(stream: &str, expected: &[SseEvent]) {
        let bytes = stream.as_bytes();
        assert_eq!(parsed(&[bytes]), expected, "whole: {stream:?}");
        for at in 0..=bytes.len() {
            let (head, tail) = bytes.split_at(at);
            assert_eq!(parsed(&[head, tail]), expected, "split at {at}: {stream:?}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(parsed(&single), expected, "byte by byte: {stream:?}");
    }

    #[test]
    fn events_end_at_an_empty_line_of_any_kind() {
        for end in ["\n", "\r\n", "\r"] {
            let stream = format!("id: 7{end}data: one{end}{end}data: two{end}{end}");
            check(
                &stream,
                &[event(Some("7"), None, "one"), event(Some("7"), None, "two")],
            );
        }
    }

    #[test]
    fn data_lines_join_and_one_space_goes() {
        check(
            "data: a\ndata:b\ndata:  c\ndata\n\n",
            &[event(None, None, "a\nb\n c\n")],
        );
    }

    #[test]
    fn comments_unknown_fields_and_byte_order_mark_are_skipped() {
        check(
            "\u{feff}: hello\nretry: 10\nfoo: bar\nevent: delta\ndata: {\"a\":\"ü:\"}\n\n: ping\n\n",
            &[event(None, Some("delta"), "{\"a\":\"ü:\"}")],
        );
    }

    #[test]
    fn event_without_data_or_end_is_none() {
        check(
            "event: x\n\ndata: kept\n\ndata: cut",
            &[event(None, None, "kept")],
        );
        check("\n\n\n", &[]);
    }

    #[test]
    fn long_events_are_refused_however_they_grow() {
        let too_long = Err(SseError::TooLong { limit_bytes: 8 });
        assert_eq!(SseParser::new(8).push(b"data: 12345678"), too_long);
        assert_eq!(SseParser::new(8).push(b"data\n".repeat(20).as_slice()), too_long);
        let mut many = SseParser::new(8);
        assert_eq!(many.push(b"data:1\n\n".repeat(20).as_slice()), Ok(()));
        assert_eq!(std::iter::from_fn(|| many.next_event()).count(), 20);
    }

    #[test]
    fn line_that_is_not_utf8_is_refused() {
        assert_eq!(SseParser::new(64).push(b"data: \xff\n"), Err(SseError::NotUtf8));
    }
}
