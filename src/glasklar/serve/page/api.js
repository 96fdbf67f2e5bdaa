// What the server can be asked.

import { words } from './i18n.js';

// The server's own words for what went wrong; a proxy before it may answer with something else than JSON.
async function refusal(reply) {
  const body = await reply.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `${reply.status} ${reply.statusText}`);
  error.status = reply.status;
  return error;
}

async function json(path, method = 'GET', body = undefined, signal = undefined) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } };
  const reply = await fetch(path, { method, cache: 'no-store', signal, ...sent });
  if (!reply.ok) throw await refusal(reply);
  return reply.json();
}

const at = (id, ...rest) => ['/conversations', id, ...rest].map((part, k) => (k ? encodeURIComponent(part) : part)).join('/');

export const status = () => json('/run/status');
export const metrics = (since) => json(`/run/metrics?since=${since}`);
export const progress = () => json('/run/progress');
export const models = async () => (await json('/v1/models')).data.map((model) => model.id);

export const conversations = async (search) => (await json(`/conversations?q=${encodeURIComponent(search)}`)).conversations;
export const conversation = (id) => json(at(id));
export const change = (id, what) => json(at(id), 'PATCH', what);
export const remove = (id) => json(at(id), 'DELETE');
export const exported = (id, form) => `${at(id, 'export')}?form=${form}`;
export const ask = (id, question) => (id ? json(at(id, 'messages'), 'POST', question) : json('/conversations', 'POST', question));
export const again = (id, message, settings) => json(at(id, 'messages', message, 'again'), 'POST', { settings });
export const stop = (id, message) => json(at(id, 'messages', message, 'stop'), 'POST');
export const inside = (id, message) => json(at(id, 'messages', message, 'inside'));
export const trace = (ids) => json('/v1/trace', 'POST', { ids });

// An answer as it grows: each time the whole of it. The answer goes on when nobody listens.
export async function* events(id, message, signal) {
  const reply = await fetch(at(id, 'messages', message, 'events'), { cache: 'no-store', signal });
  if (!reply.ok) throw await refusal(reply);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '', last = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith('data: ')) yield last = JSON.parse(part.slice(6));
    }
  }
  if (!last || last.state === 'running') throw new TypeError(words.lost);
}

// What to say of an error. `fetch` knows lost connections as TypeError, in words of the browser that help nobody.
export const said = (error) => (error instanceof TypeError ? words.lost : error.message);
