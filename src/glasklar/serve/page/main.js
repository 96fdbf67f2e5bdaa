// Which view is shown, and news from the server once a second.

import { metrics, status } from './api.js';
import { Chat } from './chat.js';
import { find, make } from './dom.js';
import { translate, words } from './i18n.js';
import { Training } from './training.js';

const EVERY = 1000;
let state = null, model = null, hasRun = false;

translate(document);
const training = new Training();
const chat = new Chat();

function show() {
  const wanted = location.hash.slice(1);
  const view = state === 'serving' && (wanted !== 'training' || !hasRun) ? 'chat' : 'training';
  for (const name of ['chat', 'training']) {
    find(name).hidden = name !== view;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === view) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
    link.hidden = name === 'chat' ? state !== 'serving' : state === 'serving' && !hasRun;
  }
}

// The chat takes the place of the training by itself; this says so and leads back.
function announce() {
  const back = make('a', { href: '#training', textContent: words.howItWasMade });
  find('notice').replaceChildren(`${words.ready} `, back);
  location.hash = '#chat';
  find('question').focus();
}

function apply(now, news) {
  find('model').textContent = now.model ?? now.run ?? '';
  if (news.lines.length || now.state !== state) {
    training.take(news);
    training.show(now.state, now.error);
  }
  if (now.model && now.model !== model) {
    model = now.model;
    chat.serve(model, now.single_turn);
    document.title = `${model} · glasklar`;
  }
  if (now.state === state && hasRun === (now.run !== null)) return;
  const finished = state === 'training' && now.state === 'serving';
  state = now.state;
  hasRun = now.run !== null;
  show();
  if (finished) announce();
}

function reachable(yes) {
  if (find('trouble').hidden === yes) return; // said once, not at every attempt
  find('trouble').textContent = yes ? '' : words.gone;
  find('trouble').hidden = yes;
}

async function watch() {
  let news = null;
  try {
    news = [await status(), await metrics(training.next)];
  } catch {
    reachable(false);
  }
  setTimeout(watch, news && state === 'serving' ? 5 * EVERY : EVERY);
  if (!news) return;
  reachable(true);
  apply(...news);
}

addEventListener('hashchange', show);
watch();
