// A relay in Node, as small as it gets: Twilio's media stream to a WebSocket of 16-bit samples at 16 kHz, and back. Every sample
// is sent twice upwards, every second one is dropped downwards: no filter, so images and aliases are left in. It tells what
// the sockets and the JSON cost in Node.
//
// node relay.mjs LISTEN_PORT SERVICE_PORT DIRECTORY_OF_THE_PACKAGE_WS
import { createRequire } from "node:module";

const [listen, service, directory] = process.argv.slice(2);
const { WebSocket, WebSocketServer } = createRequire(`${directory}/`)("ws");

const decoded = new Int16Array(256);
for (let code = 0; code < 256; code++) {
  const bits = ~code & 0xff;
  const magnitude = ((((bits & 0x0f) << 3) + 0x84) << ((bits & 0x70) >> 4)) - 0x84;
  decoded[code] = bits & 0x80 ? -magnitude : magnitude;
}
const encoded = new Uint8Array(65536);
for (let sample = -32768; sample < 32768; sample++) {
  const sign = sample < 0 ? 0x80 : 0;
  const magnitude = Math.min(Math.abs(sample), 32635) + 0x84;
  const exponent = 31 - Math.clz32(magnitude) - 7;
  encoded[sample & 0xffff] = ~(sign | (exponent << 4) | ((magnitude >> (exponent + 3)) & 0x0f));
}

new WebSocketServer({ host: "127.0.0.1", port: Number(listen), perMessageDeflate: false }).on("connection", (carrier) => {
  let bot = null;
  let streamSid = null;
  carrier.on("message", (data) => {
    const frame = JSON.parse(data);
    if (frame.event === "media") {
      if (!bot || bot.readyState !== WebSocket.OPEN) return;
      const codes = Buffer.from(frame.media.payload, "base64");
      const samples = new Int16Array(codes.length * 2);
      for (let at = 0; at < codes.length; at++) samples[2 * at] = samples[2 * at + 1] = decoded[codes[at]];
      bot.send(Buffer.from(samples.buffer));
    } else if (frame.event === "start") {
      streamSid = frame.start.streamSid;
      bot = new WebSocket(`ws://127.0.0.1:${service}/`, { perMessageDeflate: false });
      bot.on("open", () => bot.send(JSON.stringify({ type: "start", call_id: frame.start.callSid })));
      bot.on("message", (pcm, binary) => {
        if (!binary) return;
        const codes = Buffer.alloc(pcm.length >> 2);
        for (let at = 0; at < codes.length; at++) codes[at] = encoded[pcm.readUInt16LE(4 * at)];
        carrier.send(JSON.stringify({ event: "media", streamSid, media: { payload: codes.toString("base64") } }));
      });
      bot.on("close", () => carrier.close());
      bot.on("error", () => carrier.close());
    }
  });
  carrier.on("close", () => bot?.close());
  carrier.on("error", () => {});
});
