// What a kernel gets from the runtime that calls it: its threads, and memory.
#pragma once

#include <cstddef>
#include <functional>

namespace mmvision::amx {

class Workers {
public:
    virtual ~Workers() = default;

    // Runs the task of each index below `count`, on all threads, and returns when all are done. A
    // thread gets memory of `bytes` bytes, aligned to 64, that it keeps from one of its tasks to
    // the next.
    virtual void run(std::size_t count, std::size_t bytes,
                     const std::function<void(std::size_t, char*)>& task) = 0;

    // Most threads that may take part.
    virtual std::size_t most() const = 0;

    // Memory for all tasks, aligned to 64, until the kernel returns.
    virtual char* shared(std::size_t bytes) = 0;
};

}  // namespace mmvision::amx
