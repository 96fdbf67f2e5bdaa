// Threads that carry out a step together. A step is one function that every thread runs through; its phases are cut into
// chunks that the threads take as they come. A phase ends when all its chunks are done, not when all threads have arrived: a
// thread that the system has taken off its core holds nobody up, it finds the phases done and hurries after.
//
// Waiting spins for a bounded time, then yields, then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
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

struct alignas(64) Phase {
    std::atomic<int> total{-1}, next{0}, done{0};
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
        int total = phase.total.load(std::memory_order_acquire);
        if (total < 0) {
            // A straggler may count while later steps change the data; then `total` has been set long since.
            int counted = count(), unset = -1;
            total = phase.total.compare_exchange_strong(unset, counted) ? counted : unset;
        }
        int mine = 0;
        for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < total; ++mine) work(i);
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
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) threads_.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    int threads() const { return int(threads_.size()) + 1; }

    // Runs `body` on this thread and, unless `alone`, on all others. It may open `phases` phases at most.
    void run(int phases, bool alone, std::function<void(Worker&)> body) {
        Job& job = free_job(phases);
        job.body = std::move(body);
        if (!alone && !threads_.empty()) {
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
            phase.total.store(-1, std::memory_order_relaxed);
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
