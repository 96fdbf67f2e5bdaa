// What the server can be asked.

import { words } from './i18n.js';

// The server's own words for what went wrong; a proxy before it may answer with something else than JSON.
async function refusal(reply) {
  const body = await reply.json().catch(() => null);
  return new Error(body?.error?.message ?? `${reply.status} ${reply.statusText}`);
}

async function json(path) {
  const reply = await fetch(path, { cache: 'no-store' });
  if (!reply.ok) throw await refusal(reply);
  return reply.json();
}

export const status = () => json('/run/status');
export const metrics = (since) => json(`/run/metrics?since=${since}`);

// Streams an answer: yields OpenAI's chunks. `signal` stops it. Throws with the server's own words.
export async function* answer(body, signal) {
  const reply = await fetch('/v1/chat/completions', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!reply.ok) throw await refusal(reply);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(words.broken);
    const events = (rest + value).split('\n\n');
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith('data: ')) continue;
      const data = event.slice(6);
      if (data === '[DONE]') return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
