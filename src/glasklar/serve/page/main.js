// Which view is shown, and news from the server once a second.

import { metrics, status } from './api.js';
import { Chat } from './chat.js';
import { find } from './dom.js';
import { translate, words } from './i18n.js';
import { Training } from './training.js';

const EVERY = 1000;
let state = null;

translate(document);
const training = new Training();
const chat = new Chat();

function show() {
  const wanted = location.hash.slice(1);
  const view = state === 'serving' && wanted !== 'training' ? 'chat' : 'training';
  for (const name of ['chat', 'training']) {
    find(name).hidden = name !== view;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    link.toggleAttribute('aria-current', name === view);
    link.hidden = name === 'chat' && state !== 'serving';
  }
}

async function look() {
  const now = await status();
  find('trouble').hidden = true;
  find('model').textContent = now.model ?? now.run ?? '';
  const news = await metrics(training.next);
  if (news.lines.length || now.state !== state) {
    training.take(news);
    training.show(now.state, now.error);
  }
  if (now.state !== state) {
    const finished = state === 'training' && now.state === 'serving';
    state = now.state;
    if (now.model) chat.serve(now.model, now.single_turn);
    if (finished) location.hash = '#chat';
    show();
    if (now.model) document.title = `${now.model} · glasklar`;
  }
}

async function watch() {
  try {
    await look();
  } catch {
    find('trouble').textContent = words.gone;
    find('trouble').hidden = false;
  }
  setTimeout(watch, state === 'serving' ? 5 * EVERY : EVERY);
}

addEventListener('hashchange', show);
watch();
