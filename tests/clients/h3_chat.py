"""An independent HTTP/3 client (aioquic) streams one chat completion and prints what it saw as JSON.

Usage: h3_chat.py PORT CA_FILE MODEL [CANCEL_AFTER_EVENTS]
With CANCEL_AFTER_EVENTS it closes the connection in the middle of the stream.
"""
import asyncio
import json
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration

port, ca, model = int(sys.argv[1]), sys.argv[2], sys.argv[3]
cancel_after = int(sys.argv[4]) if len(sys.argv) > 4 else None


class Http3(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.events = asyncio.Queue()

    def quic_event_received(self, event):
        for http_event in self.http.handle_event(event):
            self.events.put_nowait(http_event)

    def post(self, path, body):
        stream = self._quic.get_next_available_stream_id()
        self.http.send_headers(
            stream,
            [
                (b":method", b"POST"),
                (b":scheme", b"https"),
                (b":authority", f"localhost:{port}".encode()),
                (b":path", path.encode()),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
        )
        self.http.send_data(stream, body, end_stream=True)
        self.transmit()


async def main():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name="localhost")
    configuration.load_verify_locations(ca)
    long = cancel_after is not None
    body = json.dumps(
        {
            "model": model,
            "stream": True,
            "temperature": 0,
            "ignore_eos": long,
            "max_tokens": 2000 if long else 64,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
    ).encode()
    async with connect("127.0.0.1", port, configuration=configuration, create_protocol=Http3) as client:
        client.post("/v1/chat/completions", body)
        status, text, raw, events, ids, ended = None, "", b"", 0, [], False
        while not ended:
            event = await asyncio.wait_for(client.events.get(), 60)
            if isinstance(event, HeadersReceived):
                status = dict(event.headers)[b":status"].decode()
            elif isinstance(event, DataReceived):
                raw += event.data
                while b"\n\n" in raw:
                    block, raw = raw.split(b"\n\n", 1)
                    data = None
                    for line in block.decode().split("\n"):
                        if line.startswith("id:"):
                            ids.append(line[3:].strip())
                        elif line.startswith("data:"):
                            data = line[5:].strip()
                    if data is None:
                        continue
                    events += 1
                    if data == "[DONE]":
                        ended = True
                        break
                    for choice in json.loads(data)["choices"]:
                        text += choice["delta"].get("content") or ""
                    if cancel_after is not None and events >= cancel_after:
                        ended = True
                        break
    print(json.dumps({"status": status, "text": text, "events": events, "ids": ids}))


asyncio.run(main())
