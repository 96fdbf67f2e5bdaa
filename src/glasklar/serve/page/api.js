// What the server can be asked.

async function json(path) {
  const reply = await fetch(path, { cache: 'no-store' });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
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
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
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
