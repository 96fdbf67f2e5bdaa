// Which view is shown, and news from the server once a second.

import { metrics, models, progress, status } from './api.js';
import { Chat } from './chat.js';
import { find, make } from './dom.js';
import { translate, words } from './i18n.js';
import { Sidebar } from './sidebar.js';
import { Training } from './training.js';

const EVERY = 1000;
let state = null, served = null, name = null, hasRun = false; // the model that answers; what the page is called after

translate(document);
const training = new Training();
const sidebar = new Sidebar();
const chat = new Chat(sidebar);

// #/ a new conversation, #/c/ID an earlier one, #/training how the model was made
function show() {
  const [, place, id] = location.hash.split('/');
  const view = state === 'serving' && (place !== 'training' || !hasRun) ? 'chat' : 'training';
  for (const each of ['chat', 'training']) find(each).hidden = each !== view;
  find('to-training').hidden = !hasRun || state !== 'serving';
  if (view === 'training') find('to-training').setAttribute('aria-current', 'page');
  else find('to-training').removeAttribute('aria-current');
  document.body.classList.toggle('alone', state !== 'serving');
  sidebar.close();
  if (view === 'chat') chat.open(place === 'c' ? id : null);
  else title(state === 'serving' ? words.training : name ?? 'glasklar');
}

function title(text) {
  find('title').textContent = text;
  document.title = `${text} · glasklar`;
}

// The chat takes the place of the training by itself; this says so.
function announce() {
  find('notice').replaceChildren(`${words.ready} `, make('a', { href: '#/training', textContent: words.training }));
  if (location.hash !== '#/') location.hash = '#/';
  find('question').focus();
}

async function apply(now, news) {
  if (news.lines.length || now.state !== state) {
    training.take(news);
    training.show(now, await progress());
  }
  if (now.model && now.model !== served) {
    chat.serve(now, await models());
    sidebar.refresh();
    served = now.model;
  }
  name = now.model ?? now.run;
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
  let reached = true;
  try {
    await apply(await status(), await metrics(training.next));
  } catch (error) {
    if (!(error instanceof TypeError) && !error.status) throw error;
    reached = false;
  } finally {
    setTimeout(watch, reached && state === 'serving' ? 5 * EVERY : EVERY);
  }
  reachable(reached);
}

// --- appearance ---

function dress(theme) {
  document.documentElement.dataset.theme = theme;
  find('theme').value = theme;
}

find('theme').addEventListener('change', () => {
  localStorage.setItem('theme', find('theme').value);
  dress(find('theme').value);
});
dress(['light', 'dark'].includes(localStorage.getItem('theme')) ? localStorage.getItem('theme') : 'auto');
find('skip').addEventListener('click', (event) => { event.preventDefault(); (find('chat').hidden ? find('training') : find('question')).focus(); });

addEventListener('hashchange', show);
watch();
