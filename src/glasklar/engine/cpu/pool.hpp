// Threads that carry out a step together. A step is one function that every thread runs through; its phases are cut into
// chunks that the threads take as they come. A phase ends when all its chunks are done, not when all threads have arrived: a
// thread that the system has taken off its core holds nobody up, it finds the phases done and hurries after.
//
// Waiting spins for a bounded time, then yields, then sleeps. Beside another busy process a thread loses its core in the midst of
// a chunk, and the phase waits for it: so each thread stays on a core of its own (else the system may leave the other process one
// for itself), and rests between chunks where it shares that core.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace glasklar {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns when ready() does. `sleep(n)` is called once spinning and yielding have not helped.
template <class Ready, class Sleep>
inline void wait_until(Ready ready, Sleep sleep) {
    for (int i = 0; i < 2000; ++i) {
        if (ready()) return;
        relax();
    }
    // A few times only: beside a busy process each may cost a slice of its time, and a core that sleeps can be given to the
    // thread that is waited for.
    for (int i = 0; i < 8; ++i) {
        if (ready()) return;
        std::this_thread::yield();
    }
    while (!ready()) sleep();
}

// Says when a thread should rest: while something else wants its core, after a part of the time that the system gives it. The
// other then has its turn while no chunk is held.
class Manners {
    typedef std::chrono::steady_clock Clock;

   public:
    Manners() {
#if defined(__linux__)
        books_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
#endif
        waited_ = waited_for_core();
    }
    ~Manners() {
#if defined(__linux__)
        if (books_ >= 0) close(books_);
#endif
    }
    Manners(const Manners&) = delete;
    static Manners& of_this_thread() {
        static thread_local Manners manners;
        return manners;
    }

    // Asked after each chunk.
    bool rest_is_due() {
        const auto now = Clock::now();
        if (now - looked_ < std::chrono::microseconds(300)) return false;
        look(now);
        return now < shared_until_ && now - begun_ > std::chrono::milliseconds(1);
    }
    void rest() {
        std::this_thread::sleep_for(std::chrono::microseconds(50));  // others' turns are longer, and are not cut short
        look(begun_ = Clock::now());
    }

   private:
    void look(Clock::time_point now) {
        const int64_t waited = waited_for_core();
        if (waited - waited_ > 500'000) shared_until_ = now + std::chrono::milliseconds(50), begun_ = now;
        looked_ = now, waited_ = waited;
    }
    // Nanoseconds that this thread was ready and did not run, by the system's books; 0 where there are none.
    int64_t waited_for_core() const {
#if defined(__linux__)
        char text[96];
        const ssize_t size = books_ < 0 ? 0 : pread(books_, text, sizeof text - 1, 0);
        if (size <= 0) return 0;
        text[size] = 0;
        char* second;
        std::strtoull(text, &second, 10);
        return int64_t(std::strtoull(second, nullptr, 10));
#else
        return 0;
#endif
    }

    Clock::time_point looked_{}, begun_{}, shared_until_{};
    int64_t waited_ = 0;
#if defined(__linux__)
    int books_ = -1;
#endif
};

// Keeps this thread on a core while it lives.
class OnCore {
   public:
    explicit OnCore(int core) {
#if defined(__linux__)
        held_ = core >= 0 && core < CPU_SETSIZE && sched_getaffinity(0, sizeof before_, &before_) == 0;
        if (!held_) return;
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(core, &only);
        sched_setaffinity(0, sizeof only, &only);  // a core that was taken from the process in the meantime: anywhere, then
#else
        (void)core;
#endif
    }
    ~OnCore() {
#if defined(__linux__)
        if (held_) sched_setaffinity(0, sizeof before_, &before_);
#endif
    }
    OnCore(const OnCore&) = delete;

   private:
#if defined(__linux__)
    cpu_set_t before_;
    bool held_ = false;
#endif
};

struct alignas(64) Phase {
    static constexpr int UNSET = -1, COUNTING = -2;
    std::atomic<int> total{UNSET}, next{0}, done{0};
};

struct Job {
    std::vector<Phase> phases;
    std::function<void(class Worker&)> body;
    // Threads inside, plus OPEN while more may enter.
    std::atomic<int> gate{0};
    static constexpr int OPEN = 1 << 20;
};

// One thread's way through a job.
class Worker {
   public:
    Worker(Job& job, int thread) : job_(job), thread_(thread) {}
    int thread() const { return thread_; }

    // work(i) for i in [0, count()), shared among the threads. `count` reads what earlier phases have made.
    template <class Count, class Work>
    void parallel(Count count, Work work) {
        Phase& phase = job_.phases[at_++];
        // Whoever comes first counts. A straggler finds it done: it must not look at what later steps change already.
        int total = phase.total.load(std::memory_order_acquire), unset = Phase::UNSET;
        if (total < 0 && phase.total.compare_exchange_strong(unset, Phase::COUNTING)) phase.total.store(total = count(), std::memory_order_release);
        wait_until([&] { return total >= 0 || (total = phase.total.load(std::memory_order_acquire)) >= 0; },
                   [] { std::this_thread::sleep_for(std::chrono::microseconds(50)); });
        Manners& manners = Manners::of_this_thread();
        int mine = 0;
        for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < total;) {
            work(i), ++mine;
            if (!manners.rest_is_due()) continue;
            phase.done.fetch_add(mine, std::memory_order_release), mine = 0;
            manners.rest();
        }
        if (mine) phase.done.fetch_add(mine, std::memory_order_release);
        wait_until([&] { return phase.done.load(std::memory_order_acquire) >= total; },
                   [] { std::this_thread::sleep_for(std::chrono::microseconds(50)); });
    }

    // One thread does it, the others wait.
    template <class Work>
    void once(Work work) {
        parallel([] { return 1; }, [&](int) { work(); });
    }

   private:
    Job& job_;
    int thread_, at_ = 0;
};

class Pool {
   public:
    // `cores`: one for each thread, or none.
    explicit Pool(int threads, std::vector<int> cores) : cores_(std::move(cores)) {
        try {
            for (int i = 1; i < threads; ++i) threads_.emplace_back([this, i] {
                OnCore here(core_of(i));
                serve(i);
            });
        } catch (...) {  // the system gives no more threads
            stop();
            throw;
        }
    }
    ~Pool() { stop(); }
    int threads() const { return int(threads_.size()) + 1; }

    // Runs `body` on this thread and, unless `alone`, on all others. It may open `phases` phases at most.
    void run(int phases, bool alone, std::function<void(Worker&)> body) {
        Job& job = free_job(phases);
        job.body = std::move(body);
        const bool together = !alone && !threads_.empty();
        OnCore here(together ? core_of(0) : -1);
        if (together) {
            job.gate.store(Job::OPEN);
            current_.store(&job);
            {
                std::lock_guard<std::mutex> lock(mutex_);
                epoch_.fetch_add(1);
            }
            if (sleepers_.load()) wake_.notify_all();
        }
        Worker worker(job, 0);
        job.body(worker);
        job.gate.fetch_and(~Job::OPEN);
    }

   private:
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    int core_of(int thread) const { return cores_.empty() ? -1 : cores_[thread]; }

    // A job that no straggler is still inside of.
    Job& free_job(int phases) {
        for (auto& job : jobs_)
            if (job->gate.load() == 0) return reset(*job, phases);
        jobs_.push_back(std::make_unique<Job>());
        return reset(*jobs_.back(), phases);
    }
    static Job& reset(Job& job, int phases) {
        if (int(job.phases.size()) < phases) job.phases = std::vector<Phase>(phases);
        for (auto& phase : job.phases) {
            phase.total.store(Phase::UNSET, std::memory_order_relaxed);
            phase.next.store(0, std::memory_order_relaxed);
            phase.done.store(0, std::memory_order_relaxed);
        }
        return job;
    }
    static bool enter(Job& job) {
        int gate = job.gate.load();
        while (gate & Job::OPEN)
            if (job.gate.compare_exchange_weak(gate, gate + 1)) return true;
        return false;
    }

    void serve(int thread) {
        for (uint64_t seen = 0;;) {
            wait_until([&] { return epoch_.load(std::memory_order_acquire) != seen; },
                       [&] {
                           std::unique_lock<std::mutex> lock(mutex_);
                           sleepers_.fetch_add(1);
                           wake_.wait(lock, [&] { return epoch_.load() != seen; });
                           sleepers_.fetch_sub(1);
                       });
            seen = epoch_.load();
            if (stop_) return;
            Job& job = *current_.load();
            if (!enter(job)) continue;
            Worker worker(job, thread);
            job.body(worker);
            job.gate.fetch_sub(1);
        }
    }

    std::vector<int> cores_;
    std::vector<std::thread> threads_;
    std::vector<std::unique_ptr<Job>> jobs_;
    std::atomic<Job*> current_{nullptr};
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace glasklar
